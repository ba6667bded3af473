"""Brings an adapter's ranks and scales into the form that a format holds: folds scales into B, pads ranks with zeros.

All arithmetic is in float32. A folded factor keeps its dtype where that holds it exactly, and is float32 otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from veneer.formats.canonical import CanonicalAdapter, ModuleChange
from veneer.formats.format import Step
from veneer.formats.table import FOLD, PAD, TABLE, check

T = TypeVar("T", bound=Hashable)

# Method -> the leaves that its scale multiplies; of several that are there, all but those of LoRA exclude each other.
_SCALED = {
    "LORA": ("lora_B.weight", "lora_B.bias", "lora_embedding_B"),
    "LOHA": ("hada_w1_a",),
    "LOKR": ("lokr_w1", "lokr_w1_a"),
}
# Leaf of a LoRA -> the dimension that is the rank.
_RANK_DIMENSION = {"lora_A.weight": 0, "lora_B.weight": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}


@dataclass(frozen=True)
class Fitted:
    """An adapter as a format holds it.

    Attributes:
        adapter: the adapter.
        scale: the scale that all modules have, where the format has one.
        alpha: the alpha that all modules have, where the format has one.
        rank: the rank that all modules have, where the format has one.
        steps: what was done.
    """

    adapter: CanonicalAdapter
    scale: float
    alpha: float
    rank: int
    steps: list[Step]


def fitted(adapter: CanonicalAdapter, name: str, title: str, scale: float | None = None) -> Fitted:
    """Check that a format holds an adapter, and fold and pad what it holds only so.

    Args:
        adapter: the adapter.
        name: the format's name in the table.
        title: the format's name for people.
        scale: the scale that all modules are to have, where the format has one; by default the most frequent.

    Raises:
        UnsupportedError: it cannot hold it.
    """
    check(adapter, name, title)
    holds = TABLE[name]
    changes = list(adapter.modules.values())
    scale = scale or common(change.scale for change in changes)
    alpha = common(effective_alpha(change) for change in changes)
    scaled = changes
    if holds.scales == FOLD:
        wanted = [(alpha / change.rank if change.rank else 1.0) if holds.one_alpha else scale for change in changes]
        scaled = [folded(change, value) for change, value in zip(changes, wanted, strict=True)]
    elif holds.zero == FOLD:
        scaled = [change if change.scale else folded(change, 1.0) for change in changes]
    rank = max((change.rank for change in changes), default=0)
    even = [padded(change, rank) for change in scaled] if holds.ranks == PAD else scaled
    steps = _steps(changes, scaled, even)
    return Fitted(replace(adapter, modules={change.path: change for change in even}), scale, alpha, rank, steps)


def common(values: Iterable[float]) -> float:
    """Return the most frequent value that is not zero; 1.0 where there is none."""
    return most_frequent([value for value in values if value], 1.0)


def most_frequent(values: Iterable[T], default: T) -> T:
    """Return the most frequent of some values, the first of several; ``default`` where there is none."""
    counts = Counter(values)
    return counts.most_common(1)[0][0] if counts else default


def effective_alpha(change: ModuleChange) -> float:
    """Return the alpha that gives a module its scale when it is divided by the rank, as without rsLoRA."""
    return change.scale * change.rank


def folded(change: ModuleChange, scale: float) -> ModuleChange:
    """Return a change with another scale: the factor between them goes into B (or into another method's first factor).

    Args:
        change: the change.
        scale: the scale that it is to have, not zero.
    """
    if change.scale == scale or change.method not in _SCALED:
        return change
    leaves = dict(change.leaves)
    for leaf in _SCALED[change.method]:
        if leaf in leaves:
            leaves[leaf] = multiplied(leaves[leaf], change.scale / scale)
    return replace(change, leaves=leaves, scale=scale)


def changes_nothing(change: ModuleChange) -> bool:
    """Tell whether a change is zero at any scale."""
    scaled = [change.leaves[leaf] for leaf in _SCALED.get(change.method, ()) if leaf in change.leaves]
    return bool(scaled) and not any(bool(tensor.any()) for tensor in scaled)


def multiplied(tensor: Tensor, factor: float) -> Tensor:
    """Multiply a tensor in float32; return it in its own dtype where that holds the product exactly."""
    product = (tensor.double() * factor).float()
    narrow = product.to(tensor.dtype)
    return narrow if torch.equal(narrow.float(), product) else product


def padded(change: ModuleChange, rank: int) -> ModuleChange:
    """Return a LoRA's change with a larger rank: rows of zeros for A and columns of zeros for B; the scale stays."""
    if change.rank >= rank or change.method != "LORA":
        return change
    return _resized(change, rank, lambda tensor, dimension: _extended(tensor, dimension, rank))


def cut(change: ModuleChange, rank: int) -> ModuleChange | None:
    """Take padding away again, down to ``rank``; ``None`` where what lies beyond is not zero."""
    if change.rank == rank:
        return change
    if change.rank < rank or change.method != "LORA":
        return None
    beyond = [by_rank(change, leaf) for leaf in _RANK_DIMENSION if leaf in change.leaves]
    if any(bool(tensor.narrow(dimension, rank, change.rank - rank).any()) for tensor, dimension in beyond):
        return None
    return _resized(change, rank, lambda tensor, dimension: tensor.narrow(dimension, 0, rank))


def by_rank(change: ModuleChange, leaf: str) -> tuple[Tensor, int]:
    """Return a factor with its rank as a dimension of its own, and that dimension.

    Of a stack of experts A is ``[experts, rank, in]`` then, and B ``[out, rank, experts]``.
    """
    tensor = change.leaves[leaf]
    if not change.is_parameter:
        return tensor, _RANK_DIMENSION[leaf]
    if _RANK_DIMENSION[leaf] == 0:
        return tensor.reshape(-1, change.rank, tensor.shape[-1]), 1
    return tensor.reshape(tensor.shape[0], change.rank, -1), 1


def _resized(change: ModuleChange, rank: int, resize: Callable[[Tensor, int], Tensor]) -> ModuleChange:
    """Return a change of another rank, whose factors ``resize`` makes, given the dimension of the rank."""
    leaves = dict(change.leaves)
    for leaf, dimension in _RANK_DIMENSION.items():
        if leaf not in leaves:
            continue
        tensor = resize(*by_rank(change, leaf))
        if change.is_parameter:
            tensor = tensor.flatten(0, 1) if dimension == 0 else tensor.flatten(1, 2)
        leaves[leaf] = tensor.contiguous()
    return replace(change, rank=rank, leaves=leaves)


def _extended(tensor: Tensor, dimension: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dimension] = size - shape[dimension]
    return torch.cat([tensor, tensor.new_zeros(shape)], dimension)


def _steps(changes: Sequence[ModuleChange], scaled: Sequence[ModuleChange], even: Sequence[ModuleChange]) -> list[Step]:
    """Describe what was done to the modules, a step for each kind.

    Args:
        changes: the modules as they were.
        scaled: the same after folding.
        even: the same after padding too.
    """
    exact = [change.path for change, after in zip(changes, even, strict=True) if change is after]
    refolded = [(change, after) for change, after in zip(changes, scaled, strict=True) if change is not after]
    wider = [change.path for change, after in zip(scaled, even, strict=True) if change is not after]
    steps = [Step("exact", "taken over as it is", tuple(exact))] if exact else []
    if wider:
        steps.append(Step("padded", "the rank filled up with zeros", tuple(wider)))
    if refolded:
        error = max(_folding_error(*pair) for pair in refolded)
        steps.append(Step("folded", "the scale multiplied into B", tuple(change.path for change, _ in refolded), error))
    return steps


def _folding_error(before: ModuleChange, after: ModuleChange) -> float:
    """Return the relative error that rounding left in a folded factor."""
    errors = [0.0]
    for leaf in _SCALED[before.method]:
        if leaf in before.leaves:
            right = before.leaves[leaf].double() * (before.scale / after.scale)
            norm = float(right.norm())
            errors.append(float((after.leaves[leaf].double() - right).norm()) / norm if norm else 0.0)
    return max(errors)
