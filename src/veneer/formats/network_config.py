"""Makes PEFT's config for adapters of LyCORIS, whose methods have options that only the tensors' shapes tell."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from veneer.base_model.targets import names_match
from veneer.errors import UnsupportedError
from veneer.formats import original_config
from veneer.formats.canonical import CanonicalAdapter, ModuleChange
from veneer.formats.format import Base
from veneer.formats.peft_layout import ranks_and_alphas
from veneer.formats.table import MERGE, MERGE_ELSEWHERE
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
            hint=f"{MERGE_ELSEWHERE}.",
        )
    if methods == ["IA3"]:
        check_biases(changes, inputs, base, "PEFT", MERGE_ELSEWHERE)
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
    return replace(adapter, config={**values, **ranks_and_alphas(changes, "alpha")})


# -- LoKr ----------------------------------------------------------------------------------------------------


def _factors(changes: Sequence[ModuleChange], base: Base, origin: str) -> tuple[int, bool]:
    """Return the options by which PEFT gives all factors of LoKr the shapes that they have.

    Raises:
        UnsupportedError: no options do.
    """
    first = {change.path: _first_factor(change) for change in changes}
    both = any("lokr_w1_a" in change.leaves for change in changes)
    for factor in (-1, *sorted({size for sizes in first.values() for size in sizes})):
        if all(_fits(change, first[change.path], base, factor, both) for change in changes):
            return factor, both
    raise UnsupportedError(
        f"{origin}: no decompose_factor of PEFT's gives LoKr's factors the shapes they have here, such as those of "
        f"{changes[0].path}.",
        hint=f"{MERGE_ELSEWHERE}.",
    )


def _first_factor(change: ModuleChange) -> tuple[int, int]:
    """Return the rows and columns of a LoKr's first factor."""
    leaves = change.leaves
    if "lokr_w1" in leaves:
        return leaves["lokr_w1"].shape[0], leaves["lokr_w1"].shape[1]
    return leaves["lokr_w1_a"].shape[0], leaves["lokr_w1_b"].shape[1]


def _fits(change: ModuleChange, first: tuple[int, int], base: Base, factor: int, both: bool) -> bool:
    """Tell whether PEFT gives a module's factors the shapes that they have, which fit the weight."""
    out, inner = base.shapes[f"{change.path}.weight"][:2]
    second = out // first[0], inner // first[1]
    if factorization(out, factor) != (first[0], second[0]) or factorization(inner, factor) != (first[1], second[1]):
        return False
    first_is_whole = not (both and change.rank < max(first) / 2)
    second_is_whole = change.rank >= max(second) / 2
    return (first_is_whole, second_is_whole) == ("lokr_w1" in change.leaves, "lokr_w2" in change.leaves)


# -- (IA)3 ---------------------------------------------------------------------------------------------------


def check_biases(
    changes: Iterable[ModuleChange], inputs: Collection[str], base: Base, title: str, hint: str = MERGE
) -> None:
    """Refuse (IA)3 on the outputs of a layer with a bias, which PEFT scales too and LyCORIS does not.

    Args:
        changes: the changes.
        inputs: the modules whose inputs are scaled.
        base: the model that they are for.
        title: the name of the format that cannot hold them.
        hint: the way out.

    Raises:
        UnsupportedError: there is such a layer.
    """
    for change in changes:
        if change.method == "IA3" and change.path not in inputs and f"{change.path}.bias" in base.shapes:
            raise UnsupportedError(
                f"{title} cannot hold this (IA)3: {change.path} has a bias, which PEFT scales and LyCORIS leaves.",
                hint=f"{hint}.",
            )


def scaled_inputs(adapter: CanonicalAdapter) -> set[str]:
    """Return the modules whose inputs an adapter's (IA)3 scales."""
    listed = (adapter.config or {}).get("feedforward_modules")
    changes = [change for change in adapter.modules.values() if change.method == "IA3"]
    return {c.path for c in changes if (_is_row(c) if listed is None else names_match(c.path, listed))}


def _is_row(change: ModuleChange) -> bool:
    scale = change.leaves["ia3_l"]
    return scale.ndim == 2 and scale.shape[0] == 1
