"""Reads and writes adapters of MLX-LM.

adapters.safetensors: <module>.lora_a [in, r], .lora_b [r, out], and .m [out] of DoRA
    W' = W + scale * (lora_a lora_b)^T
    of experts lora_a [experts, r, in] and lora_b [experts, out, r], not transposed
    of an embedding lora_a [vocabulary, r] and lora_b [r, dim]
adapter_config.json: {"fine_tune_type": "lora", "num_layers": 16,
                      "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": [...]}}

One rank and one scale for all modules. ``keys`` are names inside each of the last ``num_layers`` layers, or full paths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import (
    BaseModelError,
    CorruptFileError,
    IncompleteCheckpointError,
    UnsupportedError,
    VeneerError,
)
from veneer.files.json_file import is_number
from veneer.files.names import ADAPTER_CONFIG
from veneer.files.source import Source
from veneer.formats import original_config
from veneer.formats.base_facts import named_base
from veneer.formats.canonical import CanonicalAdapter, ModuleChange
from veneer.formats.fit_to_base import check_fit, without_copies
from veneer.formats.format import Base, ReadOptions, Step
from veneer.formats.mlx_names import LEAF, WEIGHTS, common_layers, family_of, is_embedding, is_tied, mlx_name
from veneer.formats.mlx_tensors import (
    FUSED,
    by_module,
    change_of_module,
    choice,
    tied,
    under_base_names,
    without_base,
)
from veneer.formats.tensor_files import header_of, new_folder, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from veneer.formats.experts import ExpertStack


_OLD_WEIGHTS = "adapters.npz"
# Keys that versions write since the scale is taken alone; an alpha that stayed in their defaults means nothing.
_LATER_KEYS = frozenset({"fine_tune_type", "mask_prompt", "num_layers"})
_FACTOR = re.compile(r".+\.lora_[ab]")
_CHECKPOINT = re.compile(r"\d+_adapters\.safetensors")
# Ends of the names of bases that only MLX reads.
_MLX_BASE = re.compile(r"mlx-community/.*|.*[-_](mlx|\d+-?bit|[mn]xfp\d+|nvfp\d+|dwq)([-_].*)?", re.IGNORECASE)


class MlxFormat:
    """An adapter of MLX-LM."""

    name: ClassVar[str] = "mlx"
    title: ClassVar[str] = "MLX-LM"
    reads: ClassVar[bool] = True
    writes: ClassVar[bool] = True

    def recognise(self, source: Source) -> bool:
        """Tell whether the tensors are factors with MLX-LM's names, or the config is MLX-LM's."""
        header = header_of(source, WEIGHTS)
        if header is not None and any(_FACTOR.fullmatch(key) or FUSED.fullmatch(key) for key in header.tensors):
            return True
        if source.file is not None:
            return source.file.name == _OLD_WEIGHTS
        has_config = source.has(ADAPTER_CONFIG) and "fine_tune_type" in source.json(ADAPTER_CONFIG)
        return has_config or source.has(_OLD_WEIGHTS) or bool(_checkpoints(source))

    def read(self, source: Source, options: ReadOptions) -> Mapping[str, CanonicalAdapter]:
        """Read a folder, or a checkpoint of the training in it."""
        return {"": _read(source, options)}

    def write(self, adapters: Mapping[str, CanonicalAdapter], target: Path, base: Base | None) -> list[Step]:
        """Write a folder."""
        if len(adapters) > 1:
            raise UnsupportedError(
                f"MLX-LM takes one adapter, and there are {len(adapters)}: {', '.join(adapters)}.",
                hint="Choose one: --component NAME.",
            )
        return _write(next(iter(adapters.values())), target, base)


# -- reading -----------------------------------------------------------------------------------------------


def _read(source: Source, options: ReadOptions) -> CanonicalAdapter:
    header = header_of(source, WEIGHTS)
    if header is None:
        raise no_weights(source)
    config = _config_of(source)
    kind = _kind(config, source.origin)
    tensors = by_module(read_tensors(header), LEAF, source.origin)
    rank, scale = _rank_and_scale(config, options, source.origin)
    changes = {
        module: change_of_module(module, leaves, rank, scale, source.origin) for module, leaves in tensors.items()
    }
    _check_magnitudes(kind, tensors, source.origin)
    base = options.base or named_base(_base_of(config), source)
    return CanonicalAdapter(
        modules=_under_names_of(base, changes, source.origin),
        base=_base_of(config),
        metadata={**header.metadata, **_travelling(config)},
        notes=_notes(config),
    )


def _config_of(source: Source) -> dict[str, Any]:
    if not source.has(ADAPTER_CONFIG):
        raise IncompleteCheckpointError(
            f"{source.origin}: there is no {ADAPTER_CONFIG} beside the weights, which says their scale.",
            hint="Copy it from where the adapter was trained.",
        )
    return source.json(ADAPTER_CONFIG)


def _kind(config: Mapping[str, Any], origin: str) -> str:
    """Return ``"lora"`` or ``"dora"``."""
    kind = config.get("fine_tune_type", "dora" if config.get("use_dora") else "lora")  # use_dora: until 2024
    if kind == "full":
        raise UnsupportedError(
            f"{origin} holds whole weights (fine_tune_type 'full'), not an adapter.",
            hint="Put them into the model with mlx_lm.fuse, then: veneer extract FUSED_MODEL BASE --out ADAPTER",
        )
    if kind not in ("lora", "dora"):
        raise UnsupportedError(f"{origin}: fine_tune_type {kind!r} is not known.", hint="Known: lora, dora.")
    return str(kind)


def _under_names_of(
    base: Base | None, changes: Mapping[str, ModuleChange | ExpertStack], origin: str
) -> dict[str, ModuleChange]:
    """Return changes of MLX's modules under the names of transformers."""
    if base is None:
        return without_base(changes, origin)
    return under_base_names(changes, base, family_of(base), origin)


def no_weights(source: Source) -> VeneerError:
    """Return the error of a folder, or of a file of an older version, that has no weights which are read."""
    checkpoints = _checkpoints(source)
    if checkpoints:
        return IncompleteCheckpointError(
            f"{source.origin}: there is no {WEIGHTS}, and {len(checkpoints)} checkpoints of the training.",
            hint=f"Give one of them: {source.root / checkpoints[-1]}",
        )
    if source.has(_OLD_WEIGHTS):
        return UnsupportedError(
            f"{source.origin}: {_OLD_WEIGHTS} is of a version of MLX-LM that wrote no config.",
            hint=f"Save it as {WEIGHTS} (mx.save_safetensors), with an {ADAPTER_CONFIG} that says rank and scale.",
        )
    return IncompleteCheckpointError(
        f"{source.origin}: there is no {WEIGHTS} beside the config.",
        hint="Copy it there; a training that was cut off may not have saved it.",
    )


def _checkpoints(source: Source) -> list[str]:
    return [name for name in source.files() if _CHECKPOINT.fullmatch(name)] if source.file is None else []


def _rank_and_scale(config: Mapping[str, Any], options: ReadOptions, origin: str) -> tuple[int, float]:
    """Return the rank and the scale that a config gives all modules."""
    parameters = config.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    rank, scale, alpha = parameters.get("rank"), parameters.get("scale"), parameters.get("alpha")
    if type(rank) is not int or rank < 1 or not is_number(scale):
        raise CorruptFileError(
            f"{origin}/{ADAPTER_CONFIG}: lora_parameters has rank {rank!r} and scale {scale!r}.",
            hint="MLX-LM needs a whole number and a number there; copy the config from the training.",
        )
    if not is_number(alpha) or alpha == rank or not _LATER_KEYS.isdisjoint(config):
        return rank, float(scale)
    is_old = choice(
        options.scaling,
        f"{origin}/{ADAPTER_CONFIG} has an alpha ({alpha:g}) beside its scale: the MLX-LM of early 2024 trained with "
        f"scale * alpha / rank ({scale * alpha / rank:g}), later ones with the scale alone ({scale:g}).",
    )
    return rank, float(scale * alpha / rank if is_old else scale)


def _check_magnitudes(kind: str, modules: Mapping[str, Mapping[str, Tensor]], origin: str) -> None:
    """Refuse magnitudes where they should not be, or are missing."""
    with_length = [module for module, leaves in modules.items() if "m" in leaves]
    if kind == "lora" and with_length:
        raise CorruptFileError(
            f"{origin}: {with_length[0]} has a magnitude (m), and the config says fine_tune_type 'lora'.",
            hint='Set "fine_tune_type": "dora" in it if the adapter was trained so.',
        )
    if kind == "dora" and len(with_length) < len(modules):
        without = next(module for module in modules if module not in with_length)
        raise IncompleteCheckpointError(
            f"{origin}: {without} has no magnitude (m), and the config says fine_tune_type 'dora'.",
            hint="Copy the file again; MLX-LM saves one for each layer.",
        )
    embeddings = [module for module in with_length if is_embedding(module)]
    if embeddings:
        raise UnsupportedError(
            f"{origin}: {embeddings[0]} has DoRA with a length for each token; PEFT's has one for each dimension.",
            hint="Fuse it into the model with mlx_lm.fuse.",
        )


def _named_model(config: Mapping[str, Any]) -> str | None:
    """Return the model that a config names, under MLX-LM's key or under PEFT's, which some programs write."""
    names = (config.get(key) for key in ("model", "base_model_name_or_path"))
    return next((name for name in names if isinstance(name, str) and name), None)


def _base_of(config: Mapping[str, Any]) -> str | None:
    """Return the base that a config names, unless it is a copy that only MLX reads."""
    model = _named_model(config)
    return None if model is None or _MLX_BASE.fullmatch(model) else model


def _notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    model = _named_model(config)
    if model is None or _base_of(config) is not None:
        return ()
    return (f"It was trained on {model}, a copy for MLX alone: give the model that this was made from as the base.",)


def _travelling(config: Mapping[str, Any]) -> dict[str, str]:
    value = config.get(original_config.KEY)
    return {original_config.KEY: value} if isinstance(value, str) else {}


# -- writing -----------------------------------------------------------------------------------------------


def _write(adapter: CanonicalAdapter, target: Path, base: Base | None) -> list[Step]:
    from veneer.formats.scaling import fitted

    if base is None:
        raise BaseModelError("The names of MLX-LM depend on the base.", hint="Give it: --base")
    held = fitted(without_copies(adapter, base), MlxFormat.name, MlxFormat.title)
    _check_dora(held.adapter)
    _check_against(held.adapter, base)
    tensors: dict[str, Tensor] = {}
    for change in held.adapter.modules.values():
        tensors.update(_tensors(change, base))
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in tensors))
    config = _config(held.adapter, base, modules, held.rank, held.scale)
    with new_folder(target) as folder:
        write_tensors(folder / WEIGHTS, tensors, {})
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    return held.steps


def _check_dora(adapter: CanonicalAdapter) -> None:
    """Refuse DoRA on other layers than linear ones, and on some layers alone."""
    has = {path: "lora_magnitude_vector" in change.leaves for path, change in adapter.modules.items()}
    if not any(has.values()):
        return
    for path, change in adapter.modules.items():
        if not has[path] or change.is_parameter or "lora_embedding_A" in change.leaves:
            why = "has none" if not has[path] else "is no linear layer"
            raise UnsupportedError(
                f"MLX-LM has DoRA on all modules of an adapter, and on linear layers alone: {path} {why}.",
                hint="Convert it to a plain LoRA on the way: --as-lora --rank 16",
            )


def _check_against(adapter: CanonicalAdapter, base: Base) -> None:
    """Refuse what the base does not have, or MLX has otherwise."""
    family = family_of(base)
    check_fit(adapter.modules.values(), base, "The adapter")
    is_one = is_tied(base, family)
    for path, change in adapter.modules.items():
        if mlx_name(path, family) is None or (is_one and path == "lm_head"):
            raise UnsupportedError(
                f"MLX-LM has no layer for {path} of {base.origin}.",
                hint="Leave it out of the adapter, or merge it into the model.",
            )
        if is_one and "lora_embedding_A" in change.leaves:
            raise tied("MLX-LM", path, base)


def _tensors(change: ModuleChange, base: Base) -> dict[str, Tensor]:
    """Return the tensors of one change by their keys in MLX."""
    family = family_of(base)
    name = mlx_name(change.path, family)
    assert name is not None
    if name.is_stack:
        from veneer.formats.experts import halves, stack_of

        stack = stack_of(change)
        stacks = halves(stack, family.interleaved) if name.halves else (stack,)
        pairs = zip(name.modules, stacks, strict=True)
        return {key: tensor for module, s in pairs for key, tensor in _factors(module, s.down, s.up).items()}
    leaves = change.leaves
    down = leaves["lora_embedding_A"] if "lora_embedding_A" in leaves else leaves["lora_A.weight"]
    up = leaves["lora_embedding_B"] if "lora_embedding_B" in leaves else leaves["lora_B.weight"]
    tensors = _factors(name.path, down.T, up.T)
    if "lora_magnitude_vector" in leaves:
        tensors[f"{name.path}.m"] = leaves["lora_magnitude_vector"]
    return tensors


def _factors(module: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"{module}.lora_a": down, f"{module}.lora_b": up}


def _config(adapter: CanonicalAdapter, base: Base, modules: list[str], rank: int, scale: float) -> dict[str, Any]:
    """Return the config that MLX-LM's loader needs."""
    dora = any("lora_magnitude_vector" in change.leaves for change in adapter.modules.values())
    same = common_layers(modules, base, family_of(base))
    num_layers, keys = same or (-1, modules)
    return {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": num_layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
        **({"model": adapter.base} if adapter.base else {}),
        **original_config.metadata_of(adapter),
    }
