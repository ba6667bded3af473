"""The wrapper of a layer under tensor parallelism, which gives patches whole inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from veneer.base_model.sharding import gathered, spread
from veneer.base_model.sites.site import Site
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.patches.active_selection import ActiveSelection
from veneer.patches.patch import Patch
from veneer.patches.selection import Selection


class ShardedLayer(AdaptedLayer):
    """An adapted layer whose base layer takes or gives a part, while adapters are whole in every process.

    What each process has is gathered for the patches, and the result spread again. The gradients of an adapter's
    tensors are therefore whole in every process, and the tensors stay equal.
    """

    def __init__(self, site: Site, active_selection: ActiveSelection, inner: AdaptedLayer | None = None) -> None:
        super().__init__(site, active_selection, inner)
        # Found at the first call: True where the base layer takes, or gives, this process's part only.
        self.takes_part = self.gives_part = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the base layer under the selected adapters; arguments and shapes are the base layer's."""
        selection = self.active_selection.current
        if selection.rows is None and not self.here(selection.names):
            return self.base_layer(x, *args, **kwargs)
        mesh, columns = self._mesh, self.site.shape[1]
        self.takes_part = self.site.matrix_input and x.shape[-1] != columns
        y = super().forward(gathered(x, mesh, columns) if self.takes_part else x, *args, **kwargs)
        return spread(y, mesh) if self.gives_part else y

    @property
    def _mesh(self) -> Any:
        held: Any = self.site.stored
        return held.device_mesh

    def _base(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        mesh, rows = self._mesh, self.site.shape[0]
        y = self.base_layer(spread(x, mesh) if self.takes_part else x, *args, **kwargs)
        self.gives_part = y.shape[-1] != rows
        return gathered(y, mesh, rows) if self.gives_part else y

    @property
    def _unmerged_base(self) -> Callable[..., Any]:
        return self._base

    def fused_patch(self, patches: Sequence[Patch]) -> None:
        """Return ``None``: a fused patch is added to the base layer's own output, and here that is a part."""

    def _readable(self, selection: Selection, names: tuple[str, ...]) -> None:
        """Return ``None``, for a process has a part of the weight."""
