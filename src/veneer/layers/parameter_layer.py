"""The wrapper of a layer for one parameter that it uses inside its own ``forward``: fused experts, attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base_model.sites.site import call_with, unsupported
from veneer.errors import MixedBatchError
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.patches.patch import apply_rows
from veneer.patches.row_layout import Layout
from veneer.patches.selection import NOTHING, Selection
from veneer.patches.weight_arithmetic import composed


class AdaptedParameter(AdaptedLayer):
    """Calls the base layer with the changed parameter in the place of its own.

    Several nest, one for each parameter; the innermost calls the base layer with all of them changed.
    """

    @property
    def parameter_name(self) -> str:
        """The name of the parameter in its layer."""
        name: str = self.site.parameter
        return name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base layer under the selected adapters."""
        selection = self.active_selection.current
        if selection.rows is None:
            return self._through({}, *args, **kwargs)
        if not torch.compiler.is_compiling() and self.merged_copies and selection.of_one is not None:
            with self.active_selection.using(selection.of_one):
                return self._through({}, *args, **kwargs)
        return self._through_rows(selection, *args, **kwargs)

    def follows(self, layout: Layout) -> bool:
        """Tell whether the layer can run some rows of that layout as a batch of their own."""
        return layout.dim == 0

    def _through(self, changed: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        names = self.here(self.active_selection.current.names)
        if names != self.computed_alone:
            changed = {**changed, self.site.parameter: self._changed(names)}
        inner = self.base_layer
        if isinstance(inner, AdaptedParameter):
            return inner._through(changed, *args, **kwargs)
        return call_with(inner, changed, *args, **kwargs) if changed else inner(*args, **kwargs)

    def _changed(self, names: tuple[str, ...]) -> Tensor:
        if not names:
            return self.base_stored
        if not (self.training or torch.compiler.is_compiling()) and self.merged_copies:
            copy = None if self._wants_grad(names) else self.merged_copy(names)
            if copy is not None and copy.weight is not None:
                return copy.weight
        weight = composed(self.base_weight(), self.patches_now(names))
        return self.site.as_stored(weight).to(self.base_stored.dtype)

    def _through_rows(self, selection: Selection, *args: Any, **kwargs: Any) -> Any:
        if not args:
            first, *_ = kwargs
            args = (kwargs.pop(first),)
        x: Tensor = args[0]
        if selection.by_token and (selection.packed(x) or self.site.stored.ndim != 3):
            # Attention, and whatever else sees a sequence as a whole.
            raise unsupported(self.site, "one adapter for each token")
        if isinstance(self.site.module, nn.MultiheadAttention) and not (self.site.module.batch_first and x.ndim > 2):
            # The rows lie along its second dimension; along the first it mixes them.
            method = next(iter(self.peft_types.values())).lower()
            raise MixedBatchError(
                f"{self.site.name}: {method}.MultiheadAttention does not support mixed adapter batches without "
                "batch_first.",
                hint="Make the layer with batch_first=True, or run the rows of each adapter by themselves.",
            )
        with self.active_selection.using(NOTHING):
            y = self._through({}, *args, **kwargs)

        def run(name: str, _: Any, *args: Any, **kwargs: Any) -> Any:
            with self.active_selection.using(Selection((name,))):
                return self._through({}, *args, **kwargs)

        groups = self.rows_in(selection, x) if self._uses(selection) else {}
        return apply_rows(y, run, groups, *args, **kwargs)

    def _uses(self, selection: Selection) -> bool:
        """Tell whether an adapter of the rows changes a parameter of the layer."""
        inner = self.base_layer
        below = isinstance(inner, AdaptedParameter) and inner._uses(selection)
        return below or bool(self.here(selection.used))
