"""The wrapper of a whole block, whose input an adapter changes by states that run beside the base (SHADOW)."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from veneer.layers.adapted_layer import AdaptedLayer
from veneer.methods.shadow import ShadowRoute, current_states
from veneer.patches.row_layout import ROWS, Layout
from veneer.patches.selection import Selection


class AdaptedBlock(AdaptedLayer):
    """Changes the base block's input by the states, and the states by its output."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base block under the selected adapters; arguments and results are its own."""
        selection = self.active_selection.current
        names = self.here(selection.applied)
        if not names:
            return self.base_layer(*args, **kwargs)
        h: Tensor = args[0] if args else kwargs["hidden_states"]
        states = current_states()
        routes = {name: self._route(name) for name in names}
        for name, route in routes.items():
            h = self._moved(name, route, selection, h, states[name])
        kwargs.pop("hidden_states", None)
        output = self.base_layer(h, *args[1:], **kwargs)
        y: Tensor = output[0] if isinstance(output, tuple) else output
        for name, route in routes.items():
            rows = selection.rows_of(name, len(y), y.device)
            states[name] = route.moved_on(states[name].to(y.device), y if rows is None else y[rows])
        return output

    def follows(self, layout: Layout) -> bool:
        """Tell whether the block can tell the rows of that layout apart."""
        return layout == ROWS

    def _route(self, name: str) -> ShadowRoute:
        return cast(ShadowRoute, self.patches_now([name])[0].route)

    def _moved(self, name: str, route: ShadowRoute, selection: Selection, h: Tensor, state: Tensor) -> Tensor:
        """Return ``h``, shape ``(rows, length, hidden)``, with what an adapter adds to its rows."""
        rows = selection.rows_of(name, len(h), h.device)
        own = h if rows is None else h[rows]
        own = own + route(own.float() - state.to(h.device).float(), self.training).to(h.dtype)
        return own if rows is None else h.index_copy(0, rows, own)
