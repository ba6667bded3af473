"""Fuses the patches of one selection on a linear layer into few operations, for inference.

Patches made of low-rank parts, diagonal multipliers and shifts compose to

    y' = s * y + (x' A) B + c        x' = i * x,  A: (in, R), B: (R, out),  s, c: (out,),  i: (in,)

with ``y`` the base layer's output and ``R`` the sum of the ranks. ``A`` and ``B`` lie as their products want them, and
in the dtype in which a tiny product is cheapest: on a CPU float32, whose products begin several times faster than those
of half precision. Fused patches are a few times an adapter's size; the base's weight is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.patches.cast_cache import CastCache
from veneer.patches.multipliers import Diagonal
from veneer.patches.patch import Patch
from veneer.patches.selection import Selection
from veneer.patches.watched_parameters import Edits, Watched


@dataclass(frozen=True)
class FusedPatch:
    """Holds the fused form of patches; a part that is ``None`` changes nothing.

    Attributes:
        down: ``A``.
        up: ``B``.
        inner: ``i``.
        outer: ``s``.
        shift: ``c``.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    inner: Tensor | None = None
    outer: Tensor | None = None
    shift: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """The memory that its tensors take."""
        tensors = (self.down, self.up, self.inner, self.outer, self.shift)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def only_adds(self) -> bool:
        """True if the patch only adds ``A B``."""
        return self.inner is None and self.outer is None and self.shift is None

    def change(self, y: Tensor, overwrite: bool, x: Tensor, casts: CastCache) -> Tensor:
        """Return the layer's output, from the base's output ``y`` for ``inner * x``.

        Args:
            y: shape ``(..., out)``.
            overwrite: whether ``y`` may be overwritten, since nobody else sees it.
            x: the layer's input, shape ``(..., in)``.
            casts: casts it.
        """
        y = y.contiguous() if overwrite else y.clone(memory_format=torch.contiguous_format)
        flat = y.view(-1, y.shape[-1])
        if self.outer is None and self.shift is None:
            if self.down is None or self.up is None:
                return y
            hidden = torch.mm(casts.cast_rows(x, self.down.dtype), self.down)
            if flat.dtype is self.up.dtype:
                flat.addmm_(hidden, self.up)
            else:
                flat.add_(torch.mm(hidden, self.up))
            return y
        wide = widened(flat) if self.outer is None else flat * self.outer
        if self.shift is not None:
            wide += self.shift
        if self.down is not None and self.up is not None:
            hidden = torch.mm(casts.cast_rows(x, self.down.dtype), self.down)
            wide.addmm_(hidden.to(wide.dtype), self.up.to(wide.dtype))
        return wide.to(y.dtype).view_as(y)


def widened(y: Tensor) -> Tensor:
    """Return ``y`` in float32, or as it is where that is not narrower."""
    return y.to(torch.promote_types(y.dtype, torch.float32))


def can_fuse(patches: Sequence[Patch]) -> bool:
    """Tell whether :func:`fuse` takes all of these patches."""
    return all(
        patch.dense is None
        and patch.tokens is None
        and patch.gate is None
        and patch.route is None
        and (patch.inner is None or isinstance(patch.inner, Diagonal))
        and (patch.outer is None or isinstance(patch.outer, Diagonal))
        for patch in patches
    )


@torch.no_grad()
def fuse(patches: Sequence[Patch], bias: Tensor | None, dtype: torch.dtype) -> FusedPatch:
    """Return the fused form of patches, computed in float32; :func:`can_fuse` tells which it takes.

    Args:
        patches: in the order of the selection.
        bias: the layer's bias, shape ``(out,)``.
        dtype: of ``A`` and ``B``.
    """
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    inner: Tensor | None = None
    outer: Tensor | None = None
    changed_bias = None if bias is None else bias.float()
    for patch in patches:
        if isinstance(patch.inner, Diagonal):
            scale = patch.inner.values.float()
            downs = [down * scale.unsqueeze(1) for down in downs]
            inner = scale if inner is None else inner * scale
        if patch.up is not None and patch.down is not None:
            downs.append(patch.down.float().T)
            ups.append(patch.up.float().T * patch.scale)
        if isinstance(patch.outer, Diagonal):
            scale = patch.outer.values.float()
            ups = [up * scale for up in ups]
            outer = scale if outer is None else outer * scale
        changed_bias = patch.changed_bias(changed_bias)
    return FusedPatch(
        torch.cat(downs, 1).to(dtype).contiguous() if downs else None,
        torch.cat(ups, 0).to(dtype).contiguous() if ups else None,
        inner,
        outer,
        None if all(_moves_bias_as_output(patch) for patch in patches) else _shift(changed_bias, bias, outer),
    )


def _moves_bias_as_output(patch: Patch) -> bool:
    """Tell whether a patch does to the bias what it does to the rest of the layer's output."""
    return patch.shift is None and (patch.outer is None or patch.outer_on_bias)


def _shift(changed: Tensor | None, bias: Tensor | None, outer: Tensor | None) -> Tensor | None:
    """Return what brings the bias to ``changed``: the base's output holds ``bias``, and ``outer`` multiplies it."""
    if changed is None:
        return None
    if bias is None:
        return changed
    return changed - (bias.float() if outer is None else bias.float() * outer)


class TensorVersions:
    """Tells whether the tensors behind a cached result were changed in place since, by their version counters.

    Args:
        selection: the selection of the call that makes the result.
        tensors: all tensors behind the result, before it is made.
    """

    __slots__ = ("_call", "_edits", "_version", "sources")

    def __init__(self, selection: Selection, tensors: Sequence[Tensor]) -> None:
        self._edits = Edits.last
        # Other tensors may change without a trace: a result made from them is good for this call alone.
        self._call = None if all(type(tensor) is Watched for tensor in tensors) else selection
        self.sources = [tensor for tensor in tensors if not tensor.is_inference()]
        self._version = self._sum()

    def _sum(self) -> int:
        """Return a number that grows whenever one of the tensors is changed in place."""
        return sum([tensor._version for tensor in self.sources])

    @property
    def lasts(self) -> bool:
        """True if the result can be used again, in this call or in later ones."""
        return self._call is None or self._call.for_one_call

    def is_current(self, selection: Selection) -> bool:
        """Tell whether a call with ``selection`` may use the result: no tensor was changed since."""
        return (
            self._edits is Edits.last
            and (self._call is None or (self._call is selection and selection.for_one_call))
            and self._sum() == self._version
        )

    def wants_grad(self, x: Tensor) -> bool:
        """Tell whether a gradient would flow through a layer with these tensors and the input ``x``."""
        return torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in self.sources))


class CachedForward(TensorVersions):
    """Caches a layer's forward pass under one selection, for inference.

    Args:
        selection: the selection.
        sources: the tensors that the forward pass is made from.

    Attributes:
        selected: the selected adapters.
        forward: returns the layer's output for its input; ``None`` where nothing is cached.
        nbytes: the memory that it takes.
    """

    __slots__ = ("forward", "nbytes", "selected")

    def __init__(self, selection: Selection, sources: Sequence[Tensor]) -> None:
        super().__init__(selection, sources)
        self.selected = selection.names
        self.forward: Callable[[Tensor], Tensor] | None = None
        self.nbytes = 0


def fused_forward(fused: FusedPatch, base: Any, casts: CastCache) -> Callable[[Tensor], Tensor]:
    """Return the forward pass of a layer whose patches are ``fused``, for inputs of shape ``(..., in)``.

    Args:
        fused: the patches.
        base: the base layer, or a function that returns its output.
        casts: shared by the layers of a model.
    """
    inner, down, up = fused.inner, fused.down, fused.up
    if type(base) is nn.Linear and down is not None and up is not None and fused.only_adds:
        return _adding(base, down, up, casts)
    if type(base) is nn.Linear and down is None and fused.shift is None:
        return _scaling(base, fused)

    def forward(x: Tensor) -> Tensor:
        seen = x if inner is None else (x * inner).to(x.dtype)
        return fused.change(*base_output(base, seen), x, casts)

    return forward


def _adding(base: nn.Linear, down: Tensor, up: Tensor, casts: CastCache) -> Callable[[Tensor], Tensor]:
    """Return the same for a low-rank sum on a plain linear layer, in the fewest calls.

    Between the products of a decoding step each call costs several microseconds, however little it does: what it runs
    has been driven out of the processor's caches by the weights. Decoding went from 1.34 to 1.25 of merged:
    benchmarks/notes.md, Unmerged forward.
    """
    parameters, attributes = base._parameters, base.__dict__
    dtype, out = down.dtype, up.shape[1]

    def forward(x: Tensor) -> Tensor:
        if base._forward_hooks or base._forward_pre_hooks or "forward" in attributes:
            y: Tensor = base(x).clone(memory_format=torch.contiguous_format)
        else:
            y = F.linear(x, parameters["weight"], parameters["bias"]).contiguous()  # type: ignore[arg-type]
        hidden = torch.mm(casts.cast_rows(x, dtype), down)
        if y.dtype is dtype:
            y.view(-1, out).addmm_(hidden, up)
            return y
        change = torch.mm(hidden, up)
        return y.add_(change if len(change) == 1 else change.view_as(y))

    return forward


def _scaling(base: nn.Linear, fused: FusedPatch) -> Callable[[Tensor], Tensor]:
    """Return the same for factors alone, in the layer's dtype where it holds them exactly: one rounding.

    Decoding went from 1.27 to 1.04 of the base: benchmarks/notes.md, Methods other than LoRA.
    """
    inner, outer = (_exactly(values, base.weight.dtype) for values in (fused.inner, fused.outer))

    def forward(x: Tensor) -> Tensor:
        y, overwrite = base_output(base, x if inner is None else (x * inner).to(x.dtype))
        if outer is None:
            return y
        return y.mul_(outer) if overwrite and y.dtype is outer.dtype else (y * outer).to(y.dtype)

    return forward


def _exactly(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return ``values`` in ``dtype`` if that loses nothing, else as they are; a device is not waited for to tell."""
    if values is None or values.dtype is dtype or not dtype.is_floating_point or values.device.type != "cpu":
        return values
    narrow = values.to(dtype)
    return narrow if torch.equal(narrow.to(values.dtype), values) else values


def base_output(base: Any, x: Tensor) -> tuple[Tensor, bool]:
    """Return the output of a base layer, and whether it may be overwritten, since nobody else sees it.

    A plain linear layer is computed without the detour through its module.
    """
    if type(base) is not nn.Linear:
        return base(x), False
    if base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:
        return base(x), not base._forward_hooks
    parameters = base._parameters
    return F.linear(x, parameters["weight"], parameters["bias"]), True  # type: ignore[arg-type]


def fused_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the small products are cheapest, for a layer that computes in ``dtype``."""
    return torch.float32 if device.type == "cpu" or dtype not in (torch.float16, torch.bfloat16) else dtype
