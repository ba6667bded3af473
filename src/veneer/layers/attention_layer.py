"""The wrapper of an attention module whose queries also attend to an adapter's own keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.base_model.sites.attention import AttentionSite
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.patches.row_layout import ROWS, Layout
from veneer.patches.selection import Selection


class AdaptedAttention(AdaptedLayer):
    """Adds to the base module's output what its queries read; they are the input of the adapters' routes.

    The module's own projections may be adapted too, so they are always given the whole batch, or, for vectors that
    belong to no row, the one adapter that has them.
    """

    site: AttentionSite

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base module under the selected adapters; arguments and results are its own."""
        output = self.base_layer(*args, **kwargs)
        selection = self.active_selection.current
        names = self.here(selection.applied)
        if not names:
            return output
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        query, y = self.site.queries(x, kwargs), output[0]
        if selection.packed(x):  # its tokens are rows
            y = self._added(selection, names, query.transpose(0, 1), y.transpose(0, 1)).transpose(0, 1)
        else:
            y = self._added(selection, names, query, y)
        return (y, *output[1:])

    def follows(self, layout: Layout) -> bool:
        """Tell whether the module can tell the rows of that layout apart."""
        return layout == ROWS

    def _added(self, selection: Selection, names: tuple[str, ...], query: Tensor, y: Tensor) -> Tensor:
        """Return ``y``, shape ``(rows, length, hidden)``, with what each adapter adds to its rows."""
        groups = None if selection.rows is None else selection.groups(len(y), y.device)
        for name in names:
            if groups is None:
                y = y + self.site.output(self._heads(name, query).to(y.dtype))
                continue
            rows = groups[name]
            with self.active_selection.using(Selection((name,))):
                heads_here = self._heads(name, query[rows]).to(y.dtype)
            heads = torch.zeros(query.shape[:2] + heads_here.shape[2:], dtype=y.dtype, device=y.device).index_copy(
                0, rows, heads_here
            )
            y = y.index_copy(0, rows, (y + self.site.output(heads))[rows])
        return y

    def _heads(self, name: str, query: Tensor) -> Tensor:
        """Return what the queries read, ``(rows, length, heads * dim)``."""
        routes = [patch.route for patch in self.patches_now([name]) if patch.route is not None]
        outputs = [route(query, self.training) for route in routes]
        return torch.stack(outputs).sum(0) if len(outputs) > 1 else outputs[0]
