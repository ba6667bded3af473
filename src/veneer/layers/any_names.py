"""Modules whose children are named by users."""

from __future__ import annotations

from typing import Any

from torch import nn


class AnyNames(nn.Module):
    """A module that can have a child of any name, even ``training``, as an adapter may be called."""

    def train(self, mode: bool = True) -> Any:
        """Set the mode of this module and of its children, as torch does."""
        vars(self)["training"] = mode
        for child in self.children():
            child.train(mode)
        return self


class Copies(AnyNames, nn.ModuleDict):
    """The copies of one module, by the names of the adapters that bring them."""
