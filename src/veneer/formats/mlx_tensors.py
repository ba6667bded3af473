"""Turns the tensors of MLX's adapters into changes of a base's modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from veneer.errors import (
    BaseModelError,
    BindError,
    CorruptFileError,
    IncompleteCheckpointError,
    UnsupportedError,
    UsageError,
)
from veneer.files.names import ADAPTER_CONFIG
from veneer.formats.canonical import ModuleChange
from veneer.formats.fit_to_base import check_fit
from veneer.formats.format import Base
from veneer.formats.mlx_names import MlxFamily, is_embedding, is_sure, is_tied, mlx_name, paths_by_module

if TYPE_CHECKING:
    from torch import Tensor

    from veneer.formats.experts import ExpertStack

# A layer that MLX-LM computes in parts has a list of each factor.
FUSED = re.compile(r".+\.lora_[ab]\.\d+")


def by_module(tensors: Mapping[str, Tensor], pattern: re.Pattern[str], origin: str) -> dict[str, dict[str, Tensor]]:
    """Return module -> leaf -> tensor.

    Args:
        tensors: key -> tensor.
        pattern: matches a key as ``module`` and ``leaf``.
        origin: the source, for errors.

    Raises:
        UnsupportedError: layers that stand for several. BindError: other keys.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = pattern.fullmatch(key)
        if match is None:
            unknown.append(key)
        else:
            modules.setdefault(match["module"], {})[match["leaf"]] = tensor
    if any(FUSED.fullmatch(key) for key in unknown):
        raise UnsupportedError(
            f"{origin}: {unknown[0]} is of a layer that MLX-LM computes in parts (AFM), which no other tool has.",
            hint="Fuse it into the model with mlx_lm.fuse.",
        )
    if unknown:
        raise BindError(
            f"{origin}: {len(unknown)} tensors belong to no LoRA of MLX, the first is {unknown[0]}.",
            problems=unknown,
            hint="Leave them out where the file was made; MLX-LM does not load them either.",
        )
    return modules


def choice(scaling: str | None, question: str) -> bool:
    """Return True where alpha is divided by the rank, and False where the scale is taken plainly, as the user says.

    Raises:
        UsageError: the user has not said it, and nothing else does.
    """
    if scaling is None:
        raise UsageError(question, hint="Say which it was: --scaling plain or --scaling alpha/rank.")
    return scaling == "alpha/rank"


def change_of_module(
    module: str, leaves: Mapping[str, Tensor], rank: int, scale: float, origin: str
) -> ModuleChange | ExpertStack:
    """Return the change of one module of MLX, under its name there; a stack where it has a matrix for each expert."""
    down, up = leaves.get("lora_a"), leaves.get("lora_b")
    if down is None or up is None:
        raise IncompleteCheckpointError(
            f"{origin}: {module} has {' and '.join(sorted(leaves))}, and no {'lora_a' if down is None else 'lora_b'}.",
            hint="Copy the file again; MLX-LM saves both.",
        )
    if up.ndim == 3 and down.ndim == 2 and not down.shape[0] % up.shape[0]:
        down = down.unflatten(0, (up.shape[0], -1))  # as MLX-LM had the experts until 2025
    stacked = down.ndim == 3
    fits = (
        down.ndim == up.ndim and down.ndim in (2, 3) and (down.shape[1], up.shape[2 if stacked else 0]) == (rank, rank)
    )
    if not fits or (stacked and down.shape[0] != up.shape[0]):
        raise CorruptFileError(
            f"{origin}: {module} has lora_a {list(down.shape)} and lora_b {list(up.shape)}, no factors of rank {rank}.",
            hint=f"Is {ADAPTER_CONFIG} of the same training?",
        )
    return _stack(down, up, scale) if stacked else _matrix(module, leaves, rank, scale)


def _stack(down: Tensor, up: Tensor, scale: float) -> ExpertStack:
    from veneer.formats.experts import ExpertStack

    return ExpertStack(down, up, scale)


def _matrix(module: str, leaves: Mapping[str, Tensor], rank: int, scale: float) -> ModuleChange:
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding(module) else ("lora_A.weight", "lora_B.weight")
    factors = dict(zip(names, (leaves["lora_a"].T.contiguous(), leaves["lora_b"].T.contiguous()), strict=True))
    if "m" in leaves:
        factors["lora_magnitude_vector"] = leaves["m"]
    return ModuleChange(module, "LORA", factors, rank, scale)


def without_base(changes: Mapping[str, ModuleChange | ExpertStack], origin: str) -> dict[str, ModuleChange]:
    """Return the changes under MLX's names, where these are the base's too.

    Raises:
        BaseModelError: they depend on the base.
    """
    return {module: _sure(module, change, origin) for module, change in changes.items()}


def _sure(module: str, change: ModuleChange | ExpertStack, origin: str) -> ModuleChange:
    if isinstance(change, ModuleChange) and is_sure(module):
        return change
    raise BaseModelError(
        f"{origin}: what {module} is called outside of MLX depends on the model, and MLX-LM's config does not name one "
        "that is read here.",
        hint="Give the base: --base",
    )


def under_base_names(
    changes: Mapping[str, ModuleChange | ExpertStack], base: Base, family: MlxFamily, origin: str
) -> dict[str, ModuleChange]:
    """Return the changes under the names that the base has for what they change.

    Raises:
        BindError: the base does not have it. UnsupportedError: an embedding that is the output layer too.
    """
    paths = paths_by_module(base, family)
    unknown = [module for module in changes if module not in paths]
    if unknown:
        raise BindError(
            f"{origin}: {len(unknown)} of {len(changes)} modules are not in {base.origin}, the first is {unknown[0]}.",
            problems=unknown,
            hint="Give the base that the adapter was trained on: --base",
        )
    embeddings = [module for module in changes if is_embedding(module)]
    if embeddings and is_tied(base, family):
        raise tied(origin, embeddings[0], base)
    gathered = _gathered(changes, base, family, paths)
    check_fit(gathered.values(), base, origin)
    return gathered


def _gathered(
    changes: Mapping[str, ModuleChange | ExpertStack], base: Base, family: MlxFamily, paths: Mapping[str, str]
) -> dict[str, ModuleChange]:
    """Return path -> change, halves of a parameter put together."""
    gathered: dict[str, ModuleChange] = {}
    for module, change in changes.items():
        path = paths[module]
        if path in gathered:
            continue
        if isinstance(change, ModuleChange):
            gathered[path] = replace(change, path=path, is_parameter=f"{path}.weight" not in base.shapes)
        else:
            gathered[path] = _experts(path, changes, family)
    return gathered


def _experts(path: str, changes: Mapping[str, ModuleChange | ExpertStack], family: MlxFamily) -> ModuleChange:
    from veneer.formats.experts import ExpertStack, both, change_of

    name = mlx_name(path, family)
    assert name is not None
    stacks = [changes.get(module) for module in name.modules]
    present = [stack if isinstance(stack, ExpertStack) else None for stack in stacks]
    if name.halves:
        return change_of(path, both(present[0], present[1], family.interleaved))
    assert present[0] is not None
    return change_of(path, present[0])


def tied(what: str, module: str, base: Base) -> UnsupportedError:
    """Make the error for an adapted embedding that is the base's output layer too."""
    return UnsupportedError(
        f"{what}: {base.origin} computes its output with the embedding {module}, where MLX applies its LoRA too and "
        "PEFT does not.",
        hint="Leave the embedding out of the adapter, or merge it into the model.",
    )
