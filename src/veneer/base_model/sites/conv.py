"""Sites of convolutions: ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d`` with any stride, padding, dilation and groups.

The canonical matrix has a row for each output channel and a column for each entry of a kernel:
``(out, in / groups * k1 * k2 ...)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.base_model.sites.site import Site
from veneer.errors import MergeError

if TYPE_CHECKING:
    from veneer.patches.patch import Patch


Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
# The share of a change that rounding in float32 may leave where zeros belong.
_ROUNDING = 1e-6
_FUNCTIONS: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvSite(Site):
    """A convolution.

    A low-rank change is a convolution to ``r`` channels with the layer's own geometry, followed by one with kernel
    1. The first sees every input channel; the second has the layer's groups, as in peft. With groups a low-rank change
    has a merged form only where each group's part of the first sees no other group's channels.
    """

    channel = 1

    @property
    def conv(self) -> Conv:
        """The live layer."""
        return cast(Conv, self.module)

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], math.prod(self.stored.shape[1:])

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.conv.kernel_size)

    @property
    def groups(self) -> int:
        return self.conv.groups

    @property
    def channels(self) -> int:
        return self.stored.shape[1]

    @property
    def has_low_rank_form(self) -> bool:
        return self.groups == 1

    def low_rank_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.conv.in_channels, *self.kernel), (self.shape[0], r // self.groups, *self.point)

    def low_rank_factors(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return up.flatten(1), down.flatten(1)

    def _stored_low_rank(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        return down.reshape(-1, self.conv.in_channels, *self.kernel), up.reshape(*up.shape, *self.point)

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.reshape(stored.shape[0], -1)

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(matrix.shape[0], -1, *self.kernel)

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        conv = self.conv
        kernels = self.as_stored(matrix)
        # As many channels as the layer's input has: a kernel over all of them, whatever the layer's groups.
        groups = 1 if kernels.shape[1] == conv.in_channels else conv.groups
        padding: Any = conv.padding
        if conv.padding_mode != "zeros":
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = 0
        return _FUNCTIONS[len(self.kernel)](x, kernels, None, conv.stride, padding, conv.dilation, groups)

    def mix(self, hidden: Tensor, matrix: Tensor) -> Tensor:
        kernels = matrix.reshape(*matrix.shape, *self.point)
        return _FUNCTIONS[len(self.kernel)](hidden, kernels, groups=self.groups)

    @torch.no_grad()
    def in_weight(self, patch: Patch) -> Patch:
        if patch.up is None or patch.down is None or self.groups == 1:
            return patch
        across = self._across(patch.up.float(), patch.down.float())
        within = torch.stack([across[group, :, group] for group in range(self.groups)])
        for group in range(self.groups):
            across[group, :, group] = 0
        lost, kept = float(across.norm()), float(within.norm())
        if lost > _ROUNDING * kept:
            raise MergeError(
                f"{self.name} has {self.groups} groups, and its LoRA connects channels across them: "
                f"{lost / math.hypot(lost, kept):.0%} of its change. No weight of that layer can hold this.",
                hint="Keep the adapter unmerged, or train with this layer in exclude_modules.",
            )
        dense = patch.scale * within.reshape(self.shape)
        if patch.operator is not None:
            dense = dense + patch.operator.dense()
        return replace(patch, up=None, down=None, dense=dense)

    def _across(self, up: Tensor, down: Tensor) -> Tensor:
        """Return a low-rank change as a matrix from every group's input to every group's output.

        Args:
            up: shape ``(out, r / groups)``.
            down: shape ``(r, in * k1 * k2 ...)``.

        Returns:
            shape ``(groups, out / groups, groups, in / groups * k1 * k2 ...)``.
        """
        change: Tensor = up.reshape(self.groups, -1, up.shape[1]) @ down.reshape(self.groups, -1, down.shape[1])
        return change.reshape(*change.shape[:2], self.groups, -1)
