"""Modules whose children are named by users."""

from __future__ import annotations

from typing import Any

from torch import nn


class AnyNames(nn.Module):
    """A module that can have a child called ``training``, as an adapter may be: its own mode is no child."""

    def train(self, mode: bool = True) -> Any:
        """Torch's own, but for that name."""
        vars(self)["training"] = mode
        for child in self.children():
            child.train(mode)
        return self


class Copies(AnyNames, nn.ModuleDict):
    """Adapter's name -> its copy of a module."""
