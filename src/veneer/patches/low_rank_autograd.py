"""Low-rank updates as one node of autograd, which keeps the layer's input and no copy of it.

    y' = y + s * drop(x) V^T U^T        y = x W^T + b, or as given

For the backward pass autograd by itself keeps ``x`` in float32, its dropped form, the mask of that, and each product.
This node keeps ``x`` as it came. It computes ``x V^T`` again, which is r / in of a product, and draws the mask again
from its seed. The sum is formed in the wider of the dtypes and rounded once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.errors import UnsupportedError
from veneer.patches.plain_calls import product_dtype
from veneer.patches.products import Exact, Products, Split, products
from veneer.patches.seeded_dropout import Dropout, is_one_part, parts


class LowRankUpdate(torch.autograd.Function):
    """Computes ``y'`` of shape ``(rows, out)``; ``x``: (rows, in), ``U``: (out, r), ``V``: (r, in).

    Either ``weight`` and ``bias`` are given or ``y``, of which no gradient is wanted or all. The backward pass is made
    of differentiable operations on what was given. ``options``: ``s``, the dropout, the arithmetic, and the dtype of
    the result.
    """

    # With the context: of a forward() without one torch makes the signature at each call, 25 us a layer.
    # benchmarks/notes.md, A training step.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor | None,
        up: Tensor,
        down: Tensor,
        options: tuple[float, Dropout, Products, torch.dtype],
    ) -> Tensor:
        scale, dropout, by, rounded = options
        if weight is not None and _is_plain(x, weight, up, down, options):
            # In the fewest calls, as ``TrainingForward`` tells.
            result = F.linear(x, weight, bias).addmm_(x @ down.t(), up.t(), alpha=scale)
            ctx.save_for_backward(x, weight, up, down)
            ctx.options, ctx.y_dtype = options, rounded
            return result
        with _without_autocast(x):
            if weight is not None:
                result = F.linear(x.to(weight.dtype), weight, bias).to(rounded)
            else:
                assert y is not None
                result = y.to(rounded, copy=True)
            to_hidden, to_output, gain = by.factor(down).t(), by.factor(up).t(), scale * dropout.gain
            for total, (seen, _) in zip(parts(result, x), dropout.masked_parts(x), strict=True):
                by.add(total, by.hidden(by.activations(seen), to_hidden) * gain, to_output)
        ctx.save_for_backward(x, weight, up, down)
        ctx.options = options
        ctx.y_dtype = (y if weight is None else weight).dtype  # type: ignore[union-attr]
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, up, down = ctx.saved_tensors
        scale, dropout, by, _ = ctx.options
        wants_x, _, _, wants_y, wants_up, wants_down, _ = ctx.needs_input_grad
        if weight is not None and grad.dtype is x.dtype and _is_plain(x, weight, up, down, ctx.options):
            to_hidden = (grad @ up).mul_(scale)
            to_x = (grad @ weight).addmm_(to_hidden, down) if wants_x else None
            to_up = grad.t() @ (x @ down.t()).mul_(scale) if wants_up else None
            return to_x, None, None, None, to_up, to_hidden.t() @ x if wants_down else None, None
        if isinstance(by, Split) and (grad.dtype is not x.dtype or torch.is_grad_enabled()):
            by = Exact(torch.float32)
        with _without_autocast(x):
            wide_up, wide_down, gain = by.factor(up), by.factor(down), scale * dropout.gain
            to_y = grad.to(ctx.y_dtype)
            sum_dtype = torch.promote_types(up.dtype, torch.float32)
            to_up = to_down = None
            hidden_parts = []
            for own, (seen, mask) in zip(parts(grad, x), dropout.masked_parts(x), strict=True):
                own, seen = by.activations(own), by.activations(seen)
                to_hidden = by.hidden(own, wide_up) * gain
                hidden_parts.append((to_hidden, mask))
                if wants_up:
                    to_up = _sum(to_up, by.hidden(own.t(), by.hidden(seen, wide_down.t()) * gain), sum_dtype)
                if wants_down:
                    to_down = _sum(to_down, by.gradient(to_hidden.t(), seen), sum_dtype)
            # The input's gradient comes last, when the float32 forms are gone.
            del own, seen
            to_x = None
            if wants_x:
                to_x = torch.zeros_like(x) if weight is None else (to_y @ weight).to(x.dtype)
                for total, (to_hidden, mask) in zip(parts(to_x, x), hidden_parts, strict=True):
                    by.add(total, to_hidden, wide_down, mask)
        return (
            to_x,
            None,
            None,
            to_y if wants_y else None,
            None if to_up is None else to_up.to(up.dtype),
            None if to_down is None else to_down.to(down.dtype),
            None,
        )


def _sum(total: Tensor | None, product: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a part of a gradient in ``dtype``, added to ``total`` in place where there is one."""
    return product.to(dtype) if total is None else total.add_(product)


def _is_plain(x: Tensor, weight: Tensor, up: Tensor, down: Tensor, options: tuple[Any, ...]) -> bool:
    """Tell whether all is of one dtype, nothing is dropped, and the rows need no parts."""
    _, dropout, _, rounded = options
    return (
        x.dtype is weight.dtype is up.dtype is down.dtype is rounded
        and not dropout.share
        and is_one_part(x)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a block in which products keep their dtypes."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class ScaledOutput(torch.autograd.Function):
    """Computes ``g * y + c`` of the last dimension, and keeps the result in the place of ``y``; no ``g`` is zero."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, factor: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
        scaled = y * factor
        output = (scaled if shift is None else scaled.add_(shift)).to(dtype)
        ctx.save_for_backward(output, factor, shift)
        ctx.dtype, ctx.output_version = y.dtype, output._version
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, factor, shift = _unchanged(ctx)
        _, wants_factor, wants_shift, _ = ctx.needs_input_grad
        to_factor = to_shift = None
        if wants_factor:
            scaled = output.to(factor.dtype) if shift is None else output - shift
            to_factor = (grad * scaled).flatten(0, -2).sum(0) / factor
        if wants_shift:
            to_shift = grad.flatten(0, -2).sum(0, dtype=factor.dtype).to(shift.dtype)
        return (grad * factor).to(ctx.dtype), to_factor, to_shift, None


def _unchanged(ctx: Any) -> tuple[Any, ...]:
    """Return the saved tensors of a node that keeps its output."""
    try:
        saved: tuple[Any, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise _changed_in_place() from error
    # torch looks at no versions where hooks keep the tensors, as those of checkpointing do; a copy begins at 0.
    if saved[0]._version > ctx.output_version:
        raise _changed_in_place()
    return saved


def _changed_in_place() -> UnsupportedError:
    return UnsupportedError(
        "The model changes the output of a layer with DoRA in place, from which the magnitude's gradient is made.",
        hint="Let its activation make a new tensor (inplace=False), or leave the layer out of target_modules.",
    )


def updated(
    x: Tensor, y: Tensor | nn.Linear, up: Tensor, down: Tensor, scale: float, share: float, *, rounds: bool
) -> Tensor:
    """Return the output with a low-rank update, shape ``(..., out)``, by :class:`LowRankUpdate`.

    Args:
        x: shape ``(..., in)``.
        y: the output without, or a :func:`.plain_linear` layer that gives it for ``x``.
        up: ``U``.
        down: ``V``.
        scale: ``s``.
        share: of ``x`` that is dropped.
        rounds: round the result to the dtype of ``y``; else it has the dtype in which it was computed.
    """
    if isinstance(y, nn.Linear):
        weight, bias, given = y._parameters["weight"], y._parameters["bias"], None
    else:
        weight, bias, given = None, None, y.reshape(-1, y.shape[-1])
    y_dtype = (given if weight is None else weight).dtype  # type: ignore[union-attr]
    wide = torch.promote_types(y_dtype, up.dtype)
    dtype = product_dtype(x) if torch.is_autocast_enabled(x.device.type) else wide
    flat, options = (
        x.reshape(-1, x.shape[-1]),
        (scale, Dropout.drawn(share), products(x, dtype), y_dtype if rounds else wide),
    )
    result: Tensor = LowRankUpdate.apply(flat, weight, bias, given, up, down, options)  # type: ignore[no-untyped-call]
    return result.view(*x.shape[:-1], up.shape[0])


def scaled(y: Tensor, factor: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``g * y + c`` in ``dtype``, by :class:`ScaledOutput` where that can be."""
    # Of a zero, the result does not tell y.
    if factor.requires_grad and not bool((factor == 0).any()):
        result: Tensor = ScaledOutput.apply(y, factor, shift, dtype)  # type: ignore[no-untyped-call]
        return result
    return (y * factor if shift is None else torch.addcmul(shift, y, factor)).to(dtype)
