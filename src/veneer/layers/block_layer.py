"""The wrapper of a whole block, whose input an adapter changes by states that run beside the base (SHADOW)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from veneer.base_model.model_call import named_call
from veneer.errors import UnsupportedError
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.methods.shadow import ShadowRoute, current_states
from veneer.patches.forward_call import current
from veneer.patches.row_layout import ROWS, Layout
from veneer.patches.selection import Selection


class GivenStates:
    """Keeps the states that a block was given with an input, as long as that lives.

    A checkpointed block is run again for its gradients, after the call of the model that had the states is over.
    """

    def __init__(self) -> None:
        self._by_input = WeakTensorKeyDictionary()

    def __reduce__(self) -> Any:
        return GivenStates, ()

    def keep(self, h: Tensor, states: Mapping[str, Tensor], seeds: Mapping[str, Any]) -> None:
        """Keep the states and seeds of a call. Not their graph, which holds the input."""
        alone = {name: state.detach().requires_grad_(state.requires_grad) for name, state in states.items()}
        self._by_input[h] = alone, seeds

    def of(self, h: Tensor) -> tuple[dict[str, Tensor], Mapping[str, Any]] | None:
        """Return those of an input."""
        if h not in self._by_input:
            return None
        states, seeds = self._by_input[h]
        return dict(states), seeds


class AdaptedBlock(AdaptedLayer):
    """Changes the base block's input by the states, and the states by its output."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base block under the selected adapters; arguments and results are its own."""
        selection = self.active_selection.current
        names = self.here(selection.applied)
        if not names:
            return self.base_layer(*args, **kwargs)
        h: Tensor = args[0] if args else kwargs["hidden_states"]
        states, seeds = self._given(h)
        for name in [name for name in names if name not in states]:
            call = {key: value for key, value in named_call(self.base_layer, args, kwargs).items() if value is not h}
            states[name] = self._own_rows(name, selection, seeds[name](h, call))
        routes = {name: self._route(name) for name in names}
        for name, route in routes.items():
            h = self._moved(name, route, selection, h, states[name])
        kwargs.pop("hidden_states", None)
        output = self.base_layer(h, *args[1:], **kwargs)
        y = self._output(output, h)
        for name, route in routes.items():
            states[name] = route.moved_on(states[name].to(y.device), self._own_rows(name, selection, y))
        return output

    def follows(self, layout: Layout) -> bool:
        """Tell whether the block can tell the rows of that layout apart."""
        return layout == ROWS

    def _given(self, h: Tensor) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        """Return the states before the block, and what makes those that are not there yet."""
        kept: GivenStates = self.__dict__.setdefault("_given_states", GivenStates())
        again = kept.of(h) if current().shadow_states is None else None
        if again is not None:
            return again
        states, seeds = current_states(), current().shadow_seeds or {}
        if seeds and self.training and torch.is_grad_enabled():
            kept.keep(h, states, seeds)
        return states, seeds

    def _route(self, name: str) -> ShadowRoute:
        return cast(ShadowRoute, self.patches_now([name])[0].route)

    def _output(self, output: Any, h: Tensor) -> Tensor:
        """Return the states in what the block gives."""
        if isinstance(output, tuple) and current().shadow_seeds:
            raise UnsupportedError(
                f"{self.site.name} gives {len(output)} tensors, and SHADOW follows blocks that give one.",
                hint="Leave it out of target_modules.",
            )
        y: Tensor = output[0] if isinstance(output, tuple) else output
        return y

    @staticmethod
    def _own_rows(name: str, selection: Selection, value: Tensor) -> Tensor:
        rows = selection.rows_of(name, len(value), value.device)
        return value if rows is None else value[rows]

    def _moved(self, name: str, route: ShadowRoute, selection: Selection, h: Tensor, state: Tensor) -> Tensor:
        """Return ``h``, shape ``(rows, length, hidden)``, with what an adapter adds to its rows."""
        rows = selection.rows_of(name, len(h), h.device)
        own = h if rows is None else h[rows]
        own = own + route(own.float() - state.to(h.device).float(), self.training).to(h.dtype)
        return own if rows is None else h.index_copy(0, rows, own)
