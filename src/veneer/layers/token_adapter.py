"""The module ``token_adapter`` of a layer: it holds the rows of single tokens that adapters train there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from veneer.errors import BaseModelError
from veneer.layers.parameter_holder import ParameterHolder

NAME = "token_adapter"
ROWS = "trainable_tokens_delta"


class TokenAdapter(ParameterHolder):
    """Holds the trained rows by adapter, and answers everything else for its layer, as peft's module does."""

    def __init__(self, training: bool, layer: nn.Module) -> None:
        super().__init__(training)
        self.belong_to(layer)

    def belong_to(self, layer: nn.Module) -> None:
        """Answer for ``layer``; by a weak reference, so that a dropped model is freed at once."""
        vars(self)["_layer"] = weakref.ref(layer)

    @property
    def trainable_tokens_delta(self) -> nn.Module:
        """The rows by adapter: the same object for layers that are trained by the same rows."""
        own = self._modules.get(ROWS)
        if own is None:
            raise AttributeError(f"{type(self).__name__} holds no rows")
        return next((rows for rows in self._rows_of_model() if _are_same(rows, own)), own)

    def _rows_of_model(self) -> Iterator[nn.Module]:
        """Return what the layers of the model hold as their rows, in the model's order; nothing once it is gone."""
        layers: Mapping[str, Any] = {}
        with suppress(BaseModelError, AttributeError):
            layers = self.active_selection.adapters.layers
        for layer in layers.values():
            adapter = getattr(layer, "_modules", {}).get(NAME)
            if adapter is not None and ROWS in adapter._modules:
                yield adapter._modules[ROWS]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = vars(self).get("_layer", lambda: None)()
            if layer is None:
                raise
            return getattr(layer, name)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_layer"}


def _are_same(rows: nn.Module, others: nn.Module) -> bool:
    ours, theirs = rows._parameters, others._parameters
    return ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
