"""Translates between PEFT's layout, a config and tensors by their keys, and the canonical form."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from veneer.base_model.targets import names_match, pattern_value, shortest
from veneer.configs.base import PeftConfig
from veneer.errors import BaseModelError, BindError, ConfigError, UnsupportedError
from veneer.files.tensor_keys import PREFIX, encode
from veneer.formats import original_config
from veneer.formats.canonical import CanonicalAdapter, ModuleChange
from veneer.formats.format import Base
from veneer.formats.scaling import changes_nothing, cut, effective_alpha, folded, most_frequent
from veneer.formats.table import AS_LORA

# Method -> the leaves of its tensors.
_LEAVES: Mapping[str, tuple[str, ...]] = {
    "LORA": (
        *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"),
        "lora_magnitude_vector",
    ),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "IA3": ("ia3_l",),
}
_NESTED = ".base_layer"
# The order in which transformers registers the parameters of fused experts.
_EXPERTS = ("gate_up_proj", "down_proj")


def canonical(
    config: PeftConfig, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], base: Base | None, origin: str
) -> CanonicalAdapter:
    """Return the canonical form of an adapter in PEFT's layout.

    Args:
        config: its config.
        tensors: key -> tensor.
        metadata: strings that came with the tensors.
        base: the base, which tells the order of parameters that are no modules.
        origin: the adapter's path, for errors.

    Raises:
        UnsupportedError: the method is none of those that other formats have. BindError: tensors are missing.
    """
    method = str(config.peft_type)
    if method not in _LEAVES:
        raise UnsupportedError(f"{origin}: other tools have no form for an adapter of {method}.", hint=f"{AS_LORA}.")
    modules: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        leaf = next((leaf for leaf in _LEAVES[method] if name.endswith("." + leaf)), None)
        if leaf is None:
            whole[name] = tensor
        else:
            modules.setdefault(name[: -len(leaf) - 1], {})[leaf] = tensor
    parameters = _parameters(config, modules, base, origin)
    changes = [
        _change(config, method, parameters.get(path, path), path in parameters, modules[path]) for path in modules
    ]
    _check_factors(changes, origin)
    return CanonicalAdapter(
        {change.path: change for change in changes},
        whole,
        base=config.base_model_name_or_path,
        config={**config.extra, **config.to_dict()},
        metadata={key: value for key, value in metadata.items() if key != "format"},
        notes=_notes(changes),
    )


def _notes(changes: Sequence[ModuleChange]) -> tuple[str, ...]:
    if not changes or any(change.scale for change in changes) or all(map(changes_nothing, changes)):
        return ()
    return (
        "Its alpha is 0, so it changes nothing, though its factors are trained: some trainers (verl) save 0 where the "
        "alpha is in a config of their own. Mend lora_alpha in adapter_config.json.",
    )


def _change(config: Any, method: str, path: str, is_parameter: bool, leaves: Mapping[str, Tensor]) -> ModuleChange:
    rank, scale = rank_and_scale(config, path)
    return ModuleChange(path, method, leaves, rank, scale, is_parameter)


def rank_and_scale(config: Any, path: str) -> tuple[int, float]:
    """Return the rank and the scale that a config gives a module; 0 and 1.0 for a method without them."""
    if not hasattr(config, "r"):
        return 0, 1.0
    alpha_option = "lora_alpha" if hasattr(config, "lora_alpha") else "alpha"
    rank = pattern_value(path, config.rank_pattern, config.r)
    alpha = pattern_value(path, config.alpha_pattern, getattr(config, alpha_option))
    return rank, alpha / (math.sqrt(rank) if getattr(config, "use_rslora", False) else rank)


def _parameters(config: PeftConfig, places: Iterable[str], base: Base | None, origin: str) -> dict[str, str]:
    """Return the parameter that each place among an adapter's keys stands for: place -> its path.

    The parameter that was registered first is innermost: ``experts.base_layer`` is ``gate_up_proj``, ``experts`` is
    ``down_proj``.
    """
    targets = getattr(config, "target_parameters", None)
    if not targets:
        return {}
    parameters: dict[str, str] = {}
    for module in dict.fromkeys(place.replace(_NESTED, "") for place in places):
        named = [name for name in _candidates(targets, module, base) if names_match(f"{module}.{name}", targets)]
        if len(named) > 1 and base is None and not set(named) <= set(_EXPERTS):
            raise BaseModelError(
                f"{origin}: the base tells in which order {module} has {', '.join(named)}.",
                hint="Name it: --base BASE.",
            )
        for depth, name in enumerate(reversed(named)):
            parameters[module + _NESTED * depth] = f"{module}.{name}"
    return parameters


def _candidates(targets: Collection[str], module: str, base: Base | None) -> list[str]:
    """Return the names of parameters that a module may have, in the order in which they are registered."""
    if base is not None:
        return [path.rpartition(".")[2] for path in base.shapes if path.rpartition(".")[0] == module]
    names = dict.fromkeys(target.rpartition(".")[2] for target in sorted(targets))
    return sorted(names, key=lambda name: _EXPERTS.index(name) if name in _EXPERTS else -1)


def _check_factors(changes: Sequence[ModuleChange], origin: str) -> None:
    """Raise ``BindError`` for modules whose factors are incomplete, or of another rank than the config says."""
    problems = [problem for change in changes if change.method == "LORA" for problem in _problems(change)]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise BindError(f"{origin}: {problems[0]}{more}.", problems=problems, hint="Copy config and weights again.")


def _problems(change: ModuleChange) -> list[str]:
    down = change.leaves.get("lora_A.weight", change.leaves.get("lora_embedding_A"))
    up = change.leaves.get("lora_B.weight", change.leaves.get("lora_embedding_B"))
    if down is None or up is None:
        return [f"{change.path} has no lora_{'A' if down is None else 'B'}"]
    if down.ndim < 2 or up.ndim != down.ndim:
        return [f"{change.path}: its factors have {down.ndim} and {up.ndim} dimensions"]
    ranks = down.shape[0], up.shape[1]
    if ranks[0] != ranks[1]:
        return [f"{change.path}: lora_A is of rank {ranks[0]}, lora_B of rank {ranks[1]}"]
    if ranks[0] != change.rank and not (change.is_parameter and not ranks[0] % change.rank):
        return [f"{change.path}: its factors are of rank {ranks[0]}, and the config says {change.rank}"]
    return []


# -- back ----------------------------------------------------------------------------------------------------


def laid_out(adapter: CanonicalAdapter, base: Base | None) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Return config and tensors of an adapter in PEFT's layout, with the config that travelled along where it fits."""
    restored = _restored(adapter)
    if restored is None:
        restored = adapter.modules, _config(adapter, base)
    modules, config = restored
    return config, keyed(modules.values(), adapter.whole, base)


def keyed(changes: Iterable[ModuleChange], whole: Mapping[str, Tensor], base: Base | None) -> dict[str, Tensor]:
    """Return the tensors of an adapter by PEFT's keys."""
    listed = list(changes)
    places = _places([change.path for change in listed if change.is_parameter], base)
    tensors = {
        encode(places.get(change.path, change.path), leaf): tensor
        for change in listed
        for leaf, tensor in change.leaves.items()
    }
    return {**tensors, **{f"{PREFIX}{name}": tensor for name, tensor in whole.items()}}


def _places(paths: Sequence[str], base: Base | None) -> dict[str, str]:
    """Return the place among PEFT's keys of each parameter that is no module; the inverse of ``_parameters``."""
    by_module: dict[str, list[str]] = {}
    for path in paths:
        module, _, name = path.rpartition(".")
        by_module.setdefault(module, []).append(name)
    places: dict[str, str] = {}
    for module, names in by_module.items():
        ordered = [name for name in _candidates(names, module, base) if name in names]
        for depth, name in enumerate(reversed(ordered)):
            places[f"{module}.{name}"] = module + _NESTED * depth
    return places


def _restored(adapter: CanonicalAdapter) -> tuple[Mapping[str, ModuleChange], PeftConfig] | None:
    """Return the modules as they were under the config that travelled along, and that config; ``None`` without one.

    What was padded is cut, and what was folded is unfolded, so that the modules' changes stay.
    """
    values = original_config.of(adapter)
    if values is None:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # reading the adapter has given them
            config = PeftConfig.from_dict(values)
    except ConfigError:
        return None
    methods = {change.method for change in adapter.modules.values()}
    if methods - {str(config.peft_type)}:
        return None
    modules = {path: _as_configured(change, config) for path, change in adapter.modules.items()}
    whole = {path: change for path, change in modules.items() if change is not None}
    return (whole, config) if len(whole) == len(modules) else None


def _as_configured(change: ModuleChange, config: PeftConfig) -> ModuleChange | None:
    """Return a change with the rank and the scale that a config gives it; ``None`` where it cannot have them."""
    rank, scale = rank_and_scale(config, change.path)
    shorter = cut(change, rank)
    if shorter is None:
        return None
    if math.isclose(shorter.scale, scale, rel_tol=1e-6) or changes_nothing(shorter):
        return replace(shorter, scale=scale)
    return None if scale == 0 else _narrowed(folded(shorter, scale))


def _narrowed(change: ModuleChange) -> ModuleChange:
    """Return a change with B in the dtype of A again, where that dtype holds it but for float32's rounding."""
    leaves = dict(change.leaves)
    for down, up in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
        if down in leaves and leaves[up].dtype != leaves[down].dtype:
            narrow = leaves[up].to(leaves[down].dtype)
            difference = (narrow.float() - leaves[up].float()).abs().max()
            if difference <= 1e-6 * leaves[up].float().abs().max():
                leaves[up] = narrow
    return replace(change, leaves=leaves)


def _config(adapter: CanonicalAdapter, base: Base | None) -> PeftConfig:
    """Make the config of an adapter that has none of its own."""
    changes = list(adapter.modules.values())
    method = most_frequent([change.method for change in changes], "LORA")
    modules = [change.path for change in changes if not change.is_parameter]
    names = sorted({path.rpartition(".")[0] for path in base.shapes}) if base is not None else modules
    values: dict[str, Any] = {
        "peft_type": method,
        "base_model_name_or_path": adapter.base,
        "target_modules": shortest(modules, names) if base is not None else modules,
    }
    if method == "LORA":
        values["target_parameters"] = [change.path for change in changes if change.is_parameter] or None
        values["use_dora"] = any("lora_magnitude_vector" in change.leaves for change in changes)
        values["lora_bias"] = any("lora_B.bias" in change.leaves for change in changes)
    if method != "IA3":
        values |= ranks_and_alphas(changes, "lora_alpha" if method == "LORA" else "alpha")
    else:
        values["feedforward_modules"] = [c.path for c in changes if c.leaves["ia3_l"].shape[0] == 1]
    return PeftConfig.from_dict(values, where="the adapter")


def ranks_and_alphas(changes: Sequence[ModuleChange], option: str) -> dict[str, Any]:
    """Return the options that say each module's rank and alpha: the most frequent values, and patterns for others."""
    ranks = {change.path: change.rank for change in changes}
    alphas = {change.path: whole_if_equal(effective_alpha(change)) for change in changes}
    rank, alpha = most_frequent(ranks.values(), 8), most_frequent(alphas.values(), 8)
    return {"r": rank, option: alpha, "rank_pattern": _pattern(ranks, rank), "alpha_pattern": _pattern(alphas, alpha)}


def whole_if_equal(number: float) -> int | float:
    """Return a number as an int where it is whole, but for the rounding of a division."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-12, abs_tol=0.0) else number


def _pattern(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Return a pattern for each module whose value is not the usual one; one for all of a name where that says it."""
    by_name: dict[str, set[Any]] = {}
    for path, value in values.items():
        by_name.setdefault(path.rpartition(".")[2], set()).add(value)
    pattern: dict[str, Any] = {}
    for path, value in values.items():
        name = path.rpartition(".")[2]
        if value != usual:
            pattern[re.escape(name) if len(by_name[name]) == 1 else _whole_name(path, values)] = value
    return pattern


def _whole_name(path: str, paths: Iterable[str]) -> str:
    """Return the expression for one module alone, of which no other's name ends in its own."""
    is_ending = any(other.endswith("." + path) for other in paths)
    return f"^{re.escape(path)}" if is_ending else re.escape(path)
