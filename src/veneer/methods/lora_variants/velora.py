"""VeLoRA: LoRA that keeps less of its input for the backward pass (Miles et al. 2024, arXiv:2405.17991, section 3).

    y = W x + scale * B A x        dL/dA = g x'^T,   x' = s (v^T x_j) v for each group x_j of x's features

``v``, of length one, is the direction of the mean group of the batch, of the first batch, or random. Only ``v^T x_j``,
one number a group, is kept of ``x`` for the gradient of A. Nothing else differs from a plain LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from veneer.base_model.sites.site import Site
from veneer.configs.lora_variant_options import VeloraConfig
from veneer.methods.base.method import Leaf
from veneer.methods.lora_variants.variant import Variant
from veneer.patches.patch import Patch

if TYPE_CHECKING:
    from veneer.methods.base.method import BaseLayer


DIRECTION = "lora_velora_embed"


@dataclass(frozen=True)
class Velora(Variant):
    """Keeps less of the input for the backward pass."""

    options: VeloraConfig
    leaves = (Leaf(DIRECTION, trained=False),)

    def _size(self, inner: int) -> int:
        """Return the number of features of a group; the last may be filled up with zeros."""
        return -(-inner // self.options.num_groups)

    def shapes(self, plain: Mapping[str, tuple[int, ...]], site: Site) -> dict[str, tuple[int, ...]]:
        return {**plain, DIRECTION: (self._size(site.shape[1]),)}

    def init(self, base: BaseLayer, generator: torch.Generator | None) -> dict[str, Tensor]:
        size = self._size(base.site.shape[1])
        if self.options.init_type == "random":
            return {DIRECTION: F.normalize(torch.randn(size, generator=generator), dim=0)}
        return {DIRECTION: torch.zeros(size)}

    def patch(self, plain: Patch, tensors: Mapping[str, Tensor]) -> Patch:
        return replace(plain, drop=lambda patch: self._kept(patch, tensors[DIRECTION]))

    def _kept(self, patch: Patch, direction: Tensor) -> Patch:
        assert patch.up is not None
        assert patch.down is not None
        route = VeloraRoute(patch.up * patch.scale, patch.down, direction, self.options)
        return replace(patch, up=None, down=None, route=route)


@dataclass(frozen=True)
class VeloraRoute:
    """Computes the low-rank product of one training step.

    Attributes:
        up: ``scale * B``, shape ``(out, r)``.
        down: ``A``, shape ``(r, in)``.
        direction: ``v``; zeros where it is not chosen yet.
        options: the variant's.
    """

    up: Tensor
    down: Tensor
    direction: Tensor
    options: VeloraConfig

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, self.down.dtype))
        direction = self._direction(x.detach()) if torch.is_grad_enabled() else self.direction
        product: Any = _Product
        hidden = product.apply(x, self.down.to(x.dtype), direction.to(x.dtype), self.options)
        return F.linear(hidden, self.up.to(hidden.dtype))

    @torch.no_grad()
    def _direction(self, x: Tensor) -> Tensor:
        """Return ``v`` for a batch, a copy: the adapter's own must be free to change before the backward pass."""
        every = self.options.init_type == "batch_average"
        if every or not bool(self.direction.any()):
            mean = _groups(x, self.options.num_groups).mean((0, 1), dtype=torch.float32)
            self.direction.copy_(F.normalize(mean if bool(mean.any()) else torch.ones_like(mean), dim=0))
        return self.direction.clone()

    def take(self, rows: Tensor, whole: torch.Size) -> VeloraRoute:
        return self

    def changes(self) -> bool:
        return bool(self.up.count_nonzero()) and bool(self.down.count_nonzero())


def _groups(x: Tensor, count: int) -> Tensor:
    """Return ``x``, shape ``(..., in)``, as ``(tokens, count, size)``."""
    size = -(-x.shape[-1] // count)
    return F.pad(x, (0, count * size - x.shape[-1])).reshape(-1, count, size)


class _Product(torch.autograd.Function):
    """Computes ``x A^T``, and restores ``x`` from one number a group where A's gradient needs it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, direction: Tensor, options: VeloraConfig) -> Tensor:
        ctx.save_for_backward(_groups(x, options.num_groups) @ direction, down, direction)
        ctx.scale = options.scale
        return F.linear(x, down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        projections, down, direction = ctx.saved_tensors
        restored = (projections.unsqueeze(-1) * direction).flatten(1)[:, : down.shape[1]] * ctx.scale
        to_input = grad @ down if ctx.needs_input_grad[0] else None
        return to_input, grad.flatten(0, -2).T @ restored, None, None
