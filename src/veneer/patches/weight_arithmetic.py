"""Merges patches into a weight: float32 throughout, rounded once to the weight's dtype.

The peer's default adds a low-precision delta, and its ``safe_merge`` rounds twice; here the sum of the weight and
every delta is formed in float32, in blocks of rows so that the working memory stays small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from veneer.errors import MergeError
from veneer.patches.patch import Patch, biases
from veneer.patches.scratch_memory import block_for

# Rows of a weight that are worked on at a time: 512 x 4096 float32 values are 8 MB, about a core's cache.
BLOCK = 512
# The same as a number of values, for a block of memory that serves again and again: it stays in the cache.
VALUES = 1 << 20
# On other devices each operation costs a launch, and memory is quick: a block is a weight, but for the largest.
VALUES_ON_DEVICE = 1 << 26


@torch.no_grad()
def merged(weight: Tensor, patches: Sequence[Patch], *, overwrite: bool = False) -> Tensor:
    """Return a weight with ``patches`` merged in, in their order.

    Args:
        weight: canonical, shape ``(out, in)``, or a stack of such; any floating dtype.
        patches: on the same device. They may read the rows of the weight that they change, not yet changed.
        overwrite: use the weight's memory for the result; else the weight is not changed.

    Returns:
        The merged weight, of ``weight``'s shape, dtype and memory layout.
    """
    result = weight if overwrite else torch.empty_like(weight)
    for into, matrix, its_patches in zip(
        matrices(result), matrices(weight), patches_by_matrix(weight, patches), strict=True
    ):
        _merge_into(into, matrix, its_patches)
    return result


def matrices(weight: Tensor) -> Sequence[Tensor]:
    """Return the matrices of a canonical weight: itself, or those of its stack."""
    return [weight] if weight.ndim == 2 else weight.unbind(0)


def patches_by_matrix(weight: Tensor, patches: Sequence[Patch]) -> Iterator[Sequence[Patch]]:
    """Yield the patches for each matrix of a canonical weight."""
    if weight.ndim == 2:
        yield patches
    else:
        yield from ([patch.at(index) for patch in patches] for index in range(weight.shape[0]))


def row_blocks(rows: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the first row and the end of each block of ``size`` rows; the last may be smaller."""
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def _merge_into(result: Tensor, weight: Tensor, patches: Sequence[Patch]) -> None:
    rows, columns = weight.shape
    block = max(rows, 1)
    if all(patch.by_rows for patch in patches):
        values = VALUES if weight.device.type == "cpu" else VALUES_ON_DEVICE
        block = min(block, max(values // max(columns, 1), 64))
    # A new float32 result is worked on where it lies; for others one block of memory serves all: fresh memory costs
    # more than the arithmetic.
    scratch = None if weight.dtype is torch.float32 and result is not weight else block_for(weight, block)
    for start, stop in row_blocks(rows, block):
        into = result[start:stop] if scratch is None else scratch[: stop - start]
        changed = changed_into(into, weight[start:stop], patches, start, stop)
        if changed is not into or scratch is not None:
            result[start:stop] = changed


def composed(weight: Tensor, patches: Sequence[Patch]) -> Tensor:
    """Return a weight with ``patches`` merged in, in float32 and with gradients."""
    return changed_rows(weight, patches, 0, weight.shape[-2])


def changed_rows(rows: Tensor, patches: Sequence[Patch], start: int, stop: int) -> Tensor:
    """Return the rows ``start:stop`` of a canonical weight with ``patches`` merged in: new, and in float32."""
    return _changed(rows.to(torch.float32, copy=True), patches, start, stop)


def changed_into(into: Tensor, rows: Tensor, patches: Sequence[Patch], start: int, stop: int) -> Tensor:
    """Return the same in ``into``, float32, where no gradient is wanted and the patches can work in place."""
    return _changed(into.copy_(rows), patches, start, stop)


def _changed(rows: Tensor, patches: Sequence[Patch], start: int, stop: int) -> Tensor:
    for patch in patches:
        rows = patch.changed_rows(rows, start, stop)
    return rows


# Above this rank a pass over the weight costs less than the products of the factors with themselves.
_LARGEST_RANK = 128


@torch.no_grad()
def added_square(patches: Sequence[Patch]) -> float | None:
    """Return the squared norm of the change that ``patches`` add to a weight, from their factors alone.

        || U V ||^2 = sum (U^T U) * (V V^T)        U^T U and V V^T: (r, r), in double precision

    Returns:
        ``None`` where they do more than add products of low rank.
    """
    factors = [(patch.up, patch.down, patch.scale) for patch in patches if patch.only_adds]
    ups = [up.double() * scale for up, _, scale in factors if up is not None]
    downs = [down.double() for _, down, _ in factors if down is not None]
    if len(ups) != len(patches) or not ups or sum(up.shape[-1] for up in ups) > _LARGEST_RANK:
        return None
    up, down = torch.cat(ups, -1), torch.cat(downs, -2)
    return max(0.0, float(((up.mT @ up) * (down @ down.mT)).sum()))


@torch.no_grad()
def merged_bias(bias: Tensor | None, patches: Sequence[Patch], dtype: torch.dtype) -> Tensor | None:
    """Return the bias with ``patches`` merged in; a layer without one gets one, of ``dtype``, if a patch shifts it."""
    changed = biases(bias, patches)[-1]
    if changed is None or (bias is None and not changed.count_nonzero()):
        return None
    return changed.to(dtype if bias is None else bias.dtype)


def check_kept(values: Tensor, data: Tensor, name: str) -> None:
    """Raise ``MergeError`` where ``data``, which is ``values`` in another dtype, has lost more than digits.

    An infinity that was there before, as of a mask, is kept; whole numbers are kept as they are.
    """
    whole = not values.is_floating_point()
    if values.dtype == data.dtype or (not whole and bool(data.isfinite().all())):
        return
    lost = data.to(values.dtype) != values if whole else values.isfinite() & ~data.isfinite()
    if bool(lost.any()):
        worst = float(values[lost].double().abs().max())
        raise MergeError(
            f"{name} holds {worst:.6g}, which {str(data.dtype).removeprefix('torch.')} does not; nothing was merged.",
            hint="Merge into a wider dtype, such as bfloat16 or float32.",
        )
