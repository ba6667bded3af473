"""The wrapper of a base layer: it runs the layer under the adapters that are selected, and merges them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base_model.sites.site import Site, copy_with, unsupported
from veneer.errors import MergeError, UnsupportedError
from veneer.layers import token_adapter
from veneer.layers.base_tuner_layer import BaseTunerLayer
from veneer.layers.inference_cache import InferenceCache, are_small, for_inference
from veneer.layers.merged_copy import CopyForward, HoldsCopies
from veneer.layers.read_weight import Unread
from veneer.layers.token_adapter import TokenAdapter
from veneer.layers.training_forward import TrainingForward
from veneer.methods.base.trained_bias import Bias
from veneer.patches.active_selection import ActiveSelection
from veneer.patches.fused import CachedForward, FusedPatch, can_fuse, fuse, fused_dtype, fused_forward
from veneer.patches.patch import Patch, apply, apply_rows, biases, for_training, whole_weight
from veneer.patches.row_layout import ROWS, Layout, refused
from veneer.patches.selection import Selection, Slots
from veneer.patches.weight_arithmetic import composed


class AdaptedLayer(BaseTunerLayer, HoldsCopies):
    """Stands in the place of a base layer that carries adapters.

    Its parameters are named as in peft: ``base_layer.weight``, ``lora_A.<adapter>.weight``. Attributes that it
    does not have (``weight``, ``in_features`` ...) are the base layer's; features are counted where it does not say
    how many it has.

    Args:
        site: the base layer.
        active_selection: the selection, shared by all layers of the model.
        inner: an adapted layer for another parameter of the base layer, which it wraps instead.

    Attributes:
        layout: the way in which its input holds the rows of a batch.
        behind_backbone: True where its input is the backbone's output, or some of its tokens.
    """

    base_layer: Any
    layout: Layout = ROWS
    behind_backbone: bool = False
    active_selection: ActiveSelection
    # The adapters whose patches are in the base layer's weight now, and the parameters that it had before.
    merged: tuple[str, ...]
    original: list[nn.Parameter | None]
    # Replaced when tensors were added, moved, or are about to be trained.
    _inference_cache: InferenceCache
    # True once the model has called the layer; it then reads the weight at most for its dtype.
    _called: bool

    def __init__(self, site: Site, active_selection: ActiveSelection, inner: AdaptedLayer | None = None) -> None:
        super().__init__()
        self._modules["base_layer"] = inner or site.module
        # Not one by one: nn.Module looks through its containers each time. 57 -> 52 ms for a model's first adapter:
        # benchmarks/notes.md, Attach.
        vars(self).update(
            site=site,
            active_selection=active_selection,
            bound={},
            held={},
            merged=(),
            original=[],
            _inference_cache=InferenceCache(),
            _called=False,
            training=site.module.training,
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = super().__getattr__("base_layer")
        if name in ("in_features", "out_features") and not hasattr(inner, name):
            return self.site.shape[0] if name == "out_features" else self.site.channels * self.site.groups
        base_value = getattr(inner, name)
        site = self.__dict__.get("site")
        if site is None or name not in (site.parameter.partition(".")[0], "bias") or not self.active_selection.in_call:
            return base_value
        return self._weight_in_call(name, base_value)

    def patches_now(self, names: Sequence[str]) -> list[Patch]:
        """Return the patches of adapters for one forward pass, with dropout while training."""
        patches = self.patches(names)
        return for_training(patches) if self.training else patches

    # -- the base layer as it was --------------------------------------------------------------------------

    def _base(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base layer's output with its original parameters, merged or not."""
        if not self.original and self.bias_in_place is None:
            return self.base_layer(*args, **kwargs)
        if self.site.shift_only or not self.original:
            return self.site.base_with_bias(self.base_bias, *args, **kwargs)
        return self.call_with(self.base_stored, self.base_bias, *args, **kwargs)

    # -- the forward pass ----------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the base layer under the selected adapters; arguments and shapes are the base layer's."""
        selection = self.active_selection.current
        if selection.rows is not None:
            if self.behind_backbone:
                selection = selection.behind_backbone(x)
            return self._forward_rows(selection, x, *args, **kwargs)
        is_plain_call = not (args or kwargs or torch.compiler.is_compiling())
        if is_plain_call and self.training:
            kept = self._inference_cache.training
            if kept is not None and kept.takes(selection, x):
                return kept(x)
        elif is_plain_call:
            cached = self._inference_cache.forward
            if cached is None or cached.selected != selection.names or not cached.is_current(selection):
                cached = self._fuse(selection)
                self.__dict__["_called"] = True
            if cached.forward is not None and not cached.wants_grad(x):
                return cached.forward(x)
        if kwargs and "adapter_names" in kwargs:
            return self._forward_named(x, *args, **kwargs)
        names = self.here(selection.names)
        if not torch.compiler.is_compiling():
            self.__dict__["_called"] = True
        if self.bias_in_place is not None and not self.merged:
            return self._forward_with_bias(self.bias_in_place.adapter, names, x, *args, **kwargs)
        if names == self.merged:
            return self.base_layer(x, *args, **kwargs)
        patches = self.patches_now(names)
        if is_plain_call and self.training:
            self._inference_cache.training = TrainingForward.of(self, selection, names, patches, x)
        return self._apply_patches(patches, x, *args, **kwargs)

    def _forward_with_bias(self, adapter: str, names: tuple[str, ...], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer while its own bias is the one that ``adapter`` trains."""
        if self.original or names[:1] != (adapter,):
            return self._apply_patches(self.patches_now(names), x, *args, **kwargs)
        lowered = [*self._lowered(adapter, without=Bias), *self.patches(names[1:])]
        patches, trained = for_training(lowered) if self.training else lowered, self.trained_bias
        if whole_weight(self.site, patches):
            return self.call_with(*self._whole(patches, trained), x, *args, **kwargs)
        base = self.base_layer if trained is self.own_bias else partial(self.site.base_with_bias, trained)
        return apply(self.site, trained, base, patches, self.training, x, *args, **kwargs)

    def _forward_named(self, x: Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
        """Run the layer by itself under one adapter for each row."""
        adapters = self.active_selection.adapters
        with adapters.using(adapters.rows(adapter_names)):
            return self(x, *args, **kwargs)

    def _fuse(self, selection: Selection) -> CachedForward:
        """Make the forward pass under a selection that inference keeps until a tensor changes."""
        cache, names, merged = self._inference_cache, self.here(selection.names), self.merged
        if self.merged_copies and (kept := self._forward_with_copy(cache, selection, names)):
            cache.forward = kept
            return kept
        cached = cache.earlier_forward(selection, self.site)
        if cached is None:
            cached = CachedForward(selection, self.sources(names))
            if names and names != merged and cached.lasts:
                cached.forward, cached.nbytes = self._kept_forward(names)
        cache.keep_forward(cached, self.site)
        return cached

    @torch.no_grad()
    def _kept_forward(self, names: tuple[str, ...]) -> tuple[Callable[[Tensor], Any] | None, int]:
        """Return the forward pass that inference keeps, if it keeps one, and the memory that it takes."""
        fused = self._fused_patch(names)
        if fused is not None:
            return fused_forward(fused, self._unmerged_base, self.active_selection.casts), fused.nbytes
        patches = self.patches(names)
        if self.site.stored.ndim == 1 and whole_weight(self.site, patches):
            return partial(self.call_with, *self._whole(patches, self.base_bias)), self.site.stored.nbytes
        if not are_small(patches, self.site):
            return None, 0
        dtype = fused_dtype(self.site.device, self.site.stored.dtype)
        nbytes = sum(patch.nbytes for patch in patches)
        return partial(self._apply_patches, [for_inference(patch, dtype) for patch in patches]), nbytes

    def _fused_patch(self, names: tuple[str, ...]) -> FusedPatch | None:
        return self.fused_patch(self.patches(names)) if self.site.matrix_input else None

    @torch.no_grad()
    def fused_patch(self, patches: Sequence[Patch]) -> FusedPatch | None:
        """Return the fused form of patches on this layer; ``None`` where it takes them one by one."""
        if not self.site.matrix_input:
            return None
        dtype = fused_dtype(self.site.device, self.site.stored.dtype)
        return fuse(patches, self.base_bias, dtype) if can_fuse(patches) else None

    def _forward_with_copy(
        self, cache: InferenceCache, selection: Selection, names: tuple[str, ...]
    ) -> CopyForward | None:
        """Return the forward pass with the merged copy of ``names``, which are here; ``None`` without one."""
        kept = cache.copies.get(selection.names)
        if kept is not None and kept.is_current(selection):
            return kept
        copy = self.merged_copy(names)
        if copy is None:
            return None
        kept = CopyForward(selection, self, copy)
        if names == selection.names:
            cache.copies[names] = kept
        return kept

    def _apply_patches(self, patches: Sequence[Patch], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if patches and whole_weight(self.site, patches):
            return self.call_with(*self._whole(patches, self.base_bias), x, *args, **kwargs)
        return apply(self.site, self.base_bias, self._unmerged_base, patches, self.training, x, *args, **kwargs)

    @property
    def _unmerged_base(self) -> Callable[..., Any]:
        """The base layer, or what computes as it did before a merge."""
        base: Callable[..., Any] = self._base if self.merged or self.bias_in_place is not None else self.base_layer
        return base

    def _whole(self, patches: Sequence[Patch], bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight, as stored, and ``bias`` with ``patches``, rounded once."""
        weight = self.site.as_stored(composed(self.base_weight(), patches)).to(self.base_stored.dtype)
        bias = biases(bias, patches)[-1]
        return weight, None if bias is None else bias.to(weight.dtype)

    def follows(self, layout: Layout) -> bool:
        """Tell whether the layer can tell the rows of that layout apart."""
        return layout.dim == 0 or (layout.dim == 1 and self.site.channel == -1)

    def rows_in(self, selection: Selection, x: Tensor) -> Mapping[str, Tensor]:
        """Return the indices that each adapter's rows have in the first dimension of ``x``."""
        if self.layout.dim < 0 and selection.is_mixed:
            raise refused(self.site.name)
        return selection.groups(x.shape[0], x.device, self.layout)

    def _forward_rows(self, selection: Selection, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._carries(selection):
            return self._base(x, *args, **kwargs)
        if not (self.training or args or kwargs or torch.compiler.is_compiling()) and self.merged_copies:
            kept = self._forward_of_one(selection)
            if kept is not None and kept.forward is not None and not kept.wants_grad(x):
                return kept.forward(x)
        if self.layout.dim > 0 and x.ndim > 1:
            # Contiguous again, for models take views of a layer's output.
            return self._forward_rows_first(selection, x.transpose(0, 1), *args, **kwargs).transpose(0, 1).contiguous()
        return self._forward_rows_first(selection, x, *args, **kwargs)

    def _carries(self, selection: Selection) -> bool:
        """Tell whether an adapter of the rows is on this layer."""
        slots = selection.slots
        if slots is None:
            return bool(self.here(selection.used))
        return slots.stacked(self) is not None or bool(slots.rest(self))

    def _forward_of_one(self, selection: Selection) -> CopyForward | None:
        """Return the forward pass with a merged copy for rows that all name the same adapter."""
        cache, one = self._inference_cache, selection.of_one
        return None if one is None else self._forward_with_copy(cache, one, one.names)

    def _forward_rows_first(self, selection: Selection, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if selection.packed(x):
            return self._forward_rows_first(selection, x.squeeze(0), *args, **kwargs).unsqueeze(0)
        if self.layout.dim < 0 and selection.is_mixed:
            raise refused(self.site.name)
        y, rest = None, None
        if not (self.training or args or kwargs or torch.compiler.is_compiling()):
            y, rest = self._forward_stacked(selection, x)
        rest = self.here(selection.used) if rest is None else rest
        if y is None:
            y = self._base(x, *args, **kwargs)
        groups = self.rows_in(selection, x) if rest else {}

        def run(name: str, own_y: Any, own_x: Tensor, *args: Any, **kwargs: Any) -> Any:
            patches = [self._for_rows(patch, selection, groups[name], x) for patch in self.patches_now([name])]
            if whole_weight(self.site, patches) or any(patch.inner is not None for patch in patches):
                return self._apply_patches(patches, own_x, *args, **kwargs)
            return apply(self.site, self.base_bias, lambda *_, **__: own_y, patches, self.training, own_x)

        return apply_rows(y, run, {name: groups[name] for name in rest if name in groups}, x, *args, **kwargs)

    def _forward_stacked(self, selection: Selection, x: Tensor) -> tuple[Tensor | None, tuple[str, ...] | None]:
        """Return the output for the rows of all adapters that are stacked, if there are any, and the others.

        Both are ``None`` where the rows of each adapter have to be computed by themselves.
        """
        if selection.slots is not None:
            return self._forward_from_slots(selection, selection.slots, x)
        names = self.here(selection.used)
        cached = self._inference_cache.mixed_forward(selection, names, self.sources, self._fused_patch)
        if not cached.together or cached.wants_grad(x):
            return None, None
        y = cached.stacked.forward(self._unmerged_base, x, selection, self.layout)
        return y, tuple(name for name in names if cached.members[name] is None)

    def _forward_from_slots(
        self, selection: Selection, slots: Slots, x: Tensor
    ) -> tuple[Tensor | None, tuple[str, ...] | None]:
        if torch.is_grad_enabled() and x.requires_grad:
            return None, None
        stacked = slots.stacked(self)
        y = None if stacked is None else stacked.forward(self._unmerged_base, x, selection, self.layout)
        return y, slots.rest(self)

    def _for_rows(self, patch: Patch, selection: Selection, rows: Tensor, x: Tensor) -> Patch:
        """Return a patch for some rows of ``x``."""
        if selection.by_token and (patch.gate is not None or patch.route is not None):
            # Such an adapter looks at whole rows, and a packed row holds several sequences.
            raise unsupported(self.site, "an adapter that acts by whole sequences, in a packed one,")
        return patch.take(rows, x.shape[:-1])

    def forget_cached(self) -> None:
        """Drop what inference keeps, because the layer is in another state now."""
        self._inference_cache = InferenceCache()
        self.active_selection.note_changed_layer()

    def forget_adapter(self, adapter: str) -> None:
        """Drop what inference keeps of an adapter alone."""
        self._inference_cache = self._inference_cache.without(adapter, self.sources)

    # -- a weight that the model reads ---------------------------------------------------------------------

    def _weight_in_call(self, name: str, base_value: Any) -> Any:
        """Return the weight or bias for a model that reads it in a call; ``base_value`` is the base's.

        A layer that is never called gives the weight with its adapters. For a layer that is called, and in training,
        where a pass and its repetition on the way back must do the same, that weight is made when it is computed with.
        """
        selection = self.active_selection.current
        names = self.here(selection.applied)
        held = self.computed_alone if name == "bias" or self.site.is_bias else self.merged
        if names == held and (selection.rows is None or not names):
            return base_value
        if isinstance(base_value, nn.Module):  # it holds the weight
            rest = self.site.parameter.partition(".")[2]
            return copy_with(base_value, {rest: self._weight_in_call(rest, base_value.get_parameter(rest))})
        if torch.compiler.is_compiling():
            # Compiled code cannot hold a tensor that refuses; where it would have to, the layer counts as a called one.
            patches = self._readable(selection, names)
            return base_value if patches is None else self._part(name, patches)
        make = partial(self._read, name, selection, names)
        if name == "bias" or not (self._called or self._wants_grad(names)):
            with suppress(UnsupportedError):
                return make()
        return Unread(base_value, make) if isinstance(base_value, Tensor) else base_value

    def _wants_grad(self, names: tuple[str, ...]) -> bool:
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.sources(names))

    def _readable(self, selection: Selection, names: tuple[str, ...]) -> list[Patch] | None:
        """Return the patches of ``names``; ``None`` where no weight can hold one, or each row has its own."""
        if selection.rows is not None and names:
            return None
        try:
            patches = self.weight_patches(names)
        except MergeError:
            return None
        return None if any(patch.gate is not None or patch.route is not None for patch in patches) else patches

    def _read(self, name: str, selection: Selection, names: tuple[str, ...]) -> Any:
        """Return the weight or bias under a selection; inference keeps the weight."""
        copy = self.merged_copy(names) if selection.rows is None and not self._wants_grad(names) else None
        if copy is not None:
            return copy.bias if name == "bias" else self.base_stored if copy.weight is None else copy.weight
        if name == "bias" or self._wants_grad(names):
            return self._made(name, selection, names)
        make = partial(self._made, name, selection, names)
        return self._inference_cache.read_weight(selection, partial(self.sources, names), make)

    def _made(self, name: str, selection: Selection, names: tuple[str, ...]) -> Any:
        patches = self._readable(selection, names)
        if patches is None:
            what = "such an adapter" if selection.rows is None else "one adapter for each row"
            raise UnsupportedError(
                f"{self.site.name}: the model computes with this layer's weight itself, which cannot hold {what}.",
                hint="Leave the layer out of target_modules, or run the rows of each adapter by themselves.",
            )
        return self._part(name, patches)

    def _part(self, name: str, patches: Sequence[Patch]) -> Tensor | None:
        """Return the weight, as stored, or the bias with ``patches``."""
        if name != "bias":
            return self.base_stored if self.site.shift_only else self._whole(patches, None)[0]
        bias = biases(self.base_bias, patches)[-1]
        return None if bias is None else bias.to(self.site.stored.dtype)

    # -- merging -------------------------------------------------------------------------------------------

    def merge_adapters(self, names: tuple[str, ...]) -> None:
        """Put the patches of ``names`` alone into the base layer's parameters, from their original bytes."""
        self.unmerge()
        names = self.here(names)
        if names or self.bias_in_place is not None:
            original = [None if self.site.shift_only else self.site.stored, self.site.bias]
            self._store(*self.merged_parameters(names))
            self.original, self.merged = original, names
        self.forget_cached()

    def store_merged(self, names: tuple[str, ...]) -> None:
        """Merge for good, giving up the original parameters."""
        parameters = self.merged_parameters(names)
        self.unmerge()
        self.take_out_bias()
        self._store(*parameters)
        self.forget_cached()

    def unmerge(self) -> None:
        """Put the original parameters back: the same tensors, so the same bytes."""
        if self.original:
            self._store(*self.original)
        self.original, self.merged = [], ()
        self.forget_cached()

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLayer:
        self._move_originals(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.watch()
        self.forget_cached()
        self.drop_outdated_copies()
        return self

    def train(self, mode: bool = True) -> AdaptedLayer:
        """Set the mode of this layer and of all in it."""
        super().train(mode)
        self.forget_cached()
        return self

    def _replicate_for_data_parallel(self) -> AdaptedLayer:
        replica: AdaptedLayer = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.merged_copies = {}
        replica.forget_cached()
        return replica

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inference_cache": None, "merged_copies": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_inference_cache": InferenceCache()})  # type: ignore[no-untyped-call]
        tokens = self._modules.get(token_adapter.NAME)
        if isinstance(tokens, TokenAdapter):
            tokens.belong_to(self)
        self.watch()

    def extra_repr(self) -> str:
        """Return the adapters' names, for a model's print-out."""
        return f"adapters={list(self.bound)}" + (f", merged={list(self.merged)}" if self.merged else "")
