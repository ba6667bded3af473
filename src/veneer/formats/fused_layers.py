"""Joins the changes of layers that are the rows of one published layer, and parts them again. Both are exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from veneer.errors import UnsupportedError
from veneer.formats.canonical import ModuleChange
from veneer.formats.scaling import common, folded
from veneer.formats.table import AS_LORA, MERGE_ELSEWHERE

# Method -> the leaves whose rows are the layer's outputs; the others belong to all rows.
_BY_ROW: Mapping[str, tuple[str, ...]] = {
    "LORA": ("lora_B.weight", "lora_B.bias", "lora_magnitude_vector"),
    "LOHA": ("hada_w1_a", "hada_w2_a"),
}
# Leaves by row -> those by input that they are multiplied with.
_FACTORS: Mapping[str, Mapping[str, str]] = {
    "LORA": {"lora_B.weight": "lora_A.weight"},
    "LOHA": {"hada_w1_a": "hada_w1_b", "hada_w2_a": "hada_w2_b"},
}


def swapped(change: ModuleChange) -> ModuleChange:
    """Return a change with its two halves of rows in the other order."""
    by_row = _BY_ROW.get(change.method, ())
    leaves = {leaf: t.roll(t.shape[0] // 2, 0) if leaf in by_row else t for leaf, t in change.leaves.items()}
    return replace(change, leaves=leaves)


def parted(change: ModuleChange, paths: Sequence[str], rows: Sequence[int]) -> list[ModuleChange]:
    """Return the changes of the layers whose rows make up a fused layer.

    Of factors that were joined block by block each layer gets its own block, and a layer without one is left out.

    Args:
        change: the fused layer's.
        paths: the layers.
        rows: the number of rows of each.

    Raises:
        UnsupportedError: the method's factors cannot be parted.
    """
    _check(change, change.path, MERGE_ELSEWHERE)
    parts = [
        {leaf: t.split(list(rows))[i] if leaf in _BY_ROW[change.method] else t for leaf, t in change.leaves.items()}
        for i in range(len(paths))
    ]
    changes = [replace(change, path=path, leaves=leaves) for path, leaves in zip(paths, parts, strict=True)]
    blocks = _blocks(change, changes)
    if blocks is None:
        return changes
    return [_block(part, columns) for part, columns in zip(changes, blocks, strict=True) if columns.any()]


def _blocks(change: ModuleChange, parts: Sequence[ModuleChange]) -> list[Tensor] | None:
    """Return the columns of B that each part uses; ``None`` unless they are apart."""
    if change.leaves.keys() != {"lora_A.weight", "lora_B.weight"}:
        return None
    columns = [(part.leaves["lora_B.weight"] != 0).any(0) for part in parts]
    used = torch.stack(columns).sum(0)
    return columns if (used <= 1).all() and used.any() else None


def _block(part: ModuleChange, columns: Tensor) -> ModuleChange:
    down, up = part.leaves["lora_A.weight"], part.leaves["lora_B.weight"]
    return replace(
        part, rank=int(columns.sum()), leaves={"lora_A.weight": down[columns], "lora_B.weight": up[:, columns]}
    )


def joined(name: str, parts: Sequence[ModuleChange | None], rows: Sequence[int]) -> ModuleChange:
    """Return the change of a fused layer whose rows are those of several layers.

    Factors by input that are equal stay one; others are stacked, and those by row put beside each other in blocks.

    Args:
        name: the fused layer.
        parts: the layers' changes; ``None`` for a layer without one.
        rows: the number of rows of each.

    Raises:
        UnsupportedError: the method's factors cannot be joined.
    """
    changes = [part for part in parts if part is not None]
    first = changes[0]
    for change in changes:
        _check(change, name, AS_LORA)
    if len({change.method for change in changes}) > 1:
        raise UnsupportedError(
            f"{name} is one layer in this format, and has changes of two methods.", hint=f"{AS_LORA}."
        )
    scale = common(change.scale for change in changes)
    even = [None if part is None else folded(part, scale) for part in parts]
    if len(changes) == len(parts) and _share_inputs(changes):
        leaves = {**first.leaves, **_stacked(even)}
        return replace(first, path=name, leaves=leaves, scale=scale)
    leaves = {}
    for by_row, by_input in _FACTORS[first.method].items():
        empty = first.leaves[by_row].new_zeros
        blocks = [
            empty(size, 0) if part is None else part.leaves[by_row] for part, size in zip(even, rows, strict=True)
        ]
        leaves[by_input] = torch.cat([part.leaves[by_input] for part in even if part is not None])
        leaves[by_row] = torch.block_diag(*blocks)
    if any("lora_magnitude_vector" in change.leaves for change in changes):
        leaves["lora_magnitude_vector"] = _magnitudes(name, parts)
    return replace(first, path=name, leaves=leaves, scale=scale, rank=sum(change.rank for change in changes))


def _share_inputs(changes: Sequence[ModuleChange]) -> bool:
    """Tell whether layers have one and the same factors by input."""
    first, *others = changes
    names = [leaf for leaf in first.leaves if leaf not in _BY_ROW[first.method]]
    return all(
        change.leaves.keys() == first.leaves.keys()
        and all(torch.equal(change.leaves[name], first.leaves[name]) for name in names)
        for change in others
    )


def _stacked(parts: Sequence[ModuleChange | None]) -> dict[str, Tensor]:
    changes = [part for part in parts if part is not None]
    names = [leaf for leaf in changes[0].leaves if leaf in _BY_ROW[changes[0].method]]
    return {name: torch.cat([change.leaves[name] for change in changes]) for name in names}


def _magnitudes(name: str, parts: Sequence[ModuleChange | None]) -> Tensor:
    vectors = [None if part is None else part.leaves.get("lora_magnitude_vector") for part in parts]
    present = [vector for vector in vectors if vector is not None]
    if len(present) < len(vectors):
        raise UnsupportedError(
            f"{name} is one layer in this format, and only some of its layers have magnitudes (DoRA).",
            hint=f"{AS_LORA}.",
        )
    return torch.cat(present)


def _check(change: ModuleChange, name: str, hint: str) -> None:
    """Refuse a change that has no rows of its own: a Kronecker product, or a convolution's core."""
    if change.method not in _BY_ROW or "hada_t1" in change.leaves:
        raise UnsupportedError(
            f"{name} is one layer in one of the two tools and several in the other, and {change.method} cannot be "
            "parted or joined by rows.",
            hint=f"{hint}.",
        )
