"""Makes PEFT's config for adapters of LyCORIS, whose methods have options that only the tensors' shapes tell."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from veneer.base_model.targets import names_match
from veneer.errors import UnsupportedError
from veneer.formats import original_config
from veneer.formats.canonical import CanonicalAdapter, ModuleChange
from veneer.formats.format import Base
from veneer.formats.table import AS_LORA
from veneer.methods.lokr import factorization


def config_of(adapter: CanonicalAdapter, inputs: Collection[str], base: Base, origin: str) -> CanonicalAdapter:
    """Return an adapter with a config of its method; a LoRA's is made where it is written.

    Args:
        adapter: the adapter.
        inputs: the modules whose inputs (IA)3 scales.
        base: the model that it is for.
        origin: the file, for errors.

    Raises:
        UnsupportedError: PEFT has no config for it.
    """
    changes = list(adapter.modules.values())
    methods = sorted({change.method for change in changes})
    if len(methods) > 1:
        raise UnsupportedError(
            f"{origin} holds changes of {' and '.join(methods)}; an adapter of PEFT is of one method.",
            hint=f"{AS_LORA}.",
        )
    if methods == ["IA3"]:
        check_biases(changes, inputs, base, "PEFT")
    if methods == ["LORA"] or original_config.of(adapter) is not None:
        return adapter
    targets = [change.path for change in changes]
    values: dict[str, Any] = {
        "peft_type": methods[0],
        "target_modules": targets,
        "base_model_name_or_path": adapter.base,
    }
    if methods == ["IA3"]:
        values["feedforward_modules"] = sorted(inputs)
        return replace(adapter, config=values)
    if methods == ["LOKR"]:
        factor, both = _factors(changes, base, origin)
        values |= {"decompose_factor": factor, "decompose_both": both}
    core = "hada_t1" if methods == ["LOHA"] else "lokr_t2"
    values["use_effective_conv2d"] = any(core in change.leaves for change in changes)
    return replace(adapter, config={**values, **_ranks_and_alphas(changes)})


def _ranks_and_alphas(changes: Sequence[ModuleChange]) -> dict[str, Any]:
    from veneer.formats.scaling import effective_alpha, most_frequent

    rank = most_frequent([change.rank for change in changes], 8)
    alpha = most_frequent([effective_alpha(change) for change in changes], 8.0)
    return {
        "r": rank,
        "alpha": alpha,
        "rank_pattern": {change.path: change.rank for change in changes if change.rank != rank},
        "alpha_pattern": {c.path: effective_alpha(c) for c in changes if effective_alpha(c) != alpha},
    }


# -- LoKr ----------------------------------------------------------------------------------------------------


def _factors(changes: Sequence[ModuleChange], base: Base, origin: str) -> tuple[int, bool]:
    """Return the options by which PEFT gives all factors of LoKr the shapes that they have.

    Raises:
        UnsupportedError: no options do.
    """
    sizes = {change.path: _sizes(change) for change in changes}
    both = any("lokr_w1_a" in change.leaves for change in changes)
    for factor in (-1, *sorted({size for (first, _) in sizes.values() for size in first})):
        if all(_fits(change, sizes[change.path], base, factor, both) for change in changes):
            return factor, both
    raise UnsupportedError(
        f"{origin}: no decompose_factor of PEFT's gives LoKr's factors the shapes they have here, such as those of "
        f"{changes[0].path}.",
        hint=f"{AS_LORA}.",
    )


def _sizes(change: ModuleChange) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return rows and columns of the first factor, and of the second."""
    leaves = change.leaves
    first = (
        leaves["lokr_w1"].shape if "lokr_w1" in leaves else (leaves["lokr_w1_a"].shape[0], leaves["lokr_w1_b"].shape[1])
    )
    if "lokr_w2" in leaves:
        second = leaves["lokr_w2"].shape
    elif "lokr_t2" in leaves:
        second = torch.Size((leaves["lokr_w2_a"].shape[1], leaves["lokr_w2_b"].shape[1]))
    else:
        second = torch.Size((leaves["lokr_w2_a"].shape[0], leaves["lokr_w2_b"].shape[1]))
    return (first[0], first[1]), (second[0], second[1])


def _fits(
    change: ModuleChange, sizes: tuple[tuple[int, int], tuple[int, int]], base: Base, factor: int, both: bool
) -> bool:
    """Tell whether PEFT gives a module's factors the shapes that they have."""
    (a, c), (b, d) = sizes
    out, inner, *kernel = base.shapes[f"{change.path}.weight"]
    has_kernel = "lokr_w2" not in change.leaves and "lokr_t2" not in change.leaves
    columns = d // math.prod(kernel) if has_kernel else d
    if factorization(out, factor) != (a, b) or factorization(inner, factor) != (c, columns):
        return False
    first_is_whole = not (both and change.rank < max(a, c) / 2)
    second_is_whole = change.rank >= max(b, columns) / 2
    return (first_is_whole, second_is_whole) == ("lokr_w1" in change.leaves, "lokr_w2" in change.leaves)


# -- (IA)3 ---------------------------------------------------------------------------------------------------


def check_biases(changes: Iterable[ModuleChange], inputs: Collection[str], base: Base, title: str) -> None:
    """Refuse (IA)3 on the outputs of a layer with a bias, which PEFT scales too and LyCORIS does not.

    Raises:
        UnsupportedError: there is such a layer.
    """
    for change in changes:
        if change.method == "IA3" and change.path not in inputs and f"{change.path}.bias" in base.shapes:
            raise UnsupportedError(
                f"{title} cannot hold this (IA)3: {change.path} has a bias, which PEFT scales and LyCORIS leaves.",
                hint="Merge it into the model: veneer merge ADAPTER --out NEW.",
            )


def scaled_inputs(adapter: CanonicalAdapter) -> set[str]:
    """Return the modules whose inputs an adapter's (IA)3 scales."""
    listed = (adapter.config or {}).get("feedforward_modules")
    changes = [change for change in adapter.modules.values() if change.method == "IA3"]
    return {c.path for c in changes if (_is_row(c) if listed is None else names_match(c.path, listed))}


def _is_row(change: ModuleChange) -> bool:
    scale = change.leaves["ia3_l"]
    return scale.ndim == 2 and scale.shape[0] == 1
