"""Which modules a config means: names, dotted endings, a regular expression, ``"all-linear"``, patterns.

Used when an adapter is made, and to cross-check one that is loaded: its checkpoint says what it holds, its
config what it should hold.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from veneer.configs.base import AnyConfig, TargetedConfig
from veneer.configs.patterns import BLOCK, ENDING, WHOLE, match
from veneer.errors import TargetError

ALL_LINEAR = "all-linear"

# What is adapted when a config names nothing: the attention projections that the LoRA paper (section 4.2)
# adapts, under each family's names. model_type -> dotted endings.
_QV = ("q_proj", "v_proj")
DEFAULTS: Mapping[str, tuple[str, ...]] = {
    "bart": _QV,
    "bert": ("query", "value"),
    "bloom": ("query_key_value",),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "electra": ("query", "value"),
    "falcon": ("query_key_value",),
    "gemma": _QV,
    "gemma2": _QV,
    "gemma3_text": _QV,
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gpt_neo": _QV,
    "gpt_neox": ("query_key_value",),
    "gptj": _QV,
    "layoutlm": ("query", "value"),
    "llama": _QV,
    "llama4": _QV,
    "llama4_text": _QV,
    "mistral": _QV,
    "mixtral": _QV,
    "mpt": ("Wqkv",),
    "mt5": ("q", "v"),
    "opt": _QV,
    "phi": (*_QV, "fc1", "fc2"),
    "phi3": ("qkv_proj",),
    "qwen2": _QV,
    "qwen3": _QV,
    "roberta": ("query", "value"),
    "stablelm": _QV,
    "t5": ("q", "v"),
    "vit": _QV,
    "whisper": _QV,
    "xlm-roberta": ("query", "value"),
}


def names_match(name: str, wanted: str | Iterable[str] | None) -> bool:
    """Whether ``wanted`` (a regular expression for the whole name, or names and dotted endings) means ``name``."""
    if wanted is None:
        return False
    if isinstance(wanted, str):
        return match(wanted, WHOLE, name) is not None
    return any(name == ending or name.endswith("." + ending) for ending in wanted)


def block_index(name: str, patterns: str | Iterable[str] | None) -> int | None:
    """The index of the block that ``name`` lies in: ``model.layers.7.mlp.up_proj`` -> 7.

    ``patterns`` names the list of blocks; without it, any list counts. The outermost list wins:
    ``encoder.block.1.layer.0.SelfAttention`` -> 1.
    """
    lists = [patterns] if isinstance(patterns, str) else list(patterns or ())
    for named in lists or [r"[^.]*"]:
        found = match(named, BLOCK, name)
        if found:
            return int(found["block"])
    return None


def pattern_value(name: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """The value of the first pattern that ``name`` ends with; ``default`` when none does."""
    for pattern, value in patterns.items():
        if match(pattern, ENDING, name):
            return value
    return default


def is_inside(name: str, parents: Iterable[str]) -> bool:
    """Whether ``name`` is one of ``parents`` or lies inside one."""
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def saved_modules(config: AnyConfig, names: Iterable[str]) -> list[str]:
    """The modules that ``modules_to_save`` means, outermost only, in the model's order.

    As in peft, an entry means every name that ends so, whether at a dot or not: "classifier" is "pre_classifier" too.
    """
    endings = tuple(config.modules_to_save or ())
    found: list[str] = []
    for name in names:
        if name.endswith(endings) and not is_inside(name, found):
            found.append(name)
    return found


def target_names(
    config: TargetedConfig,
    names: Mapping[str, bool],
    *,
    model_type: str | None = None,
    outputs: Iterable[str] = (),
) -> list[str]:
    """The modules that ``config`` adapts, in the model's order.

    Args:
        config: whose ``target_modules`` and filters are read.
        names: every module of the model -> whether it is a layer that "all-linear" means.
        model_type: the model's family, for a config that names nothing.
        outputs: modules that "all-linear" leaves out: the output embedding.

    Raises:
        TargetError: nothing is named and the family has no usual choice, or nothing matches.
    """
    wanted = config.target_modules
    if wanted is None:
        wanted = list(_default_targets(model_type, names))
    saved = saved_modules(config, names)
    if wanted == ALL_LINEAR:
        chosen = [n for n, linear in names.items() if linear and not is_inside(n, outputs)]
    else:
        chosen = [n for n in names if names_match(n, wanted)]
    kept = [n for n in chosen if not is_inside(n, saved) and not names_match(n, config.exclude_modules)]
    # A layer's whole name says which block it means, and an empty list of blocks filters nothing (as in peft).
    named = () if isinstance(wanted, str) else wanted
    kept = [n for n in kept if n in named or in_blocks(n, config)]
    if not kept:
        raise TargetError(*_nothing(config, wanted, chosen, names))
    return kept


def only_parameters(config: TargetedConfig) -> bool:
    """Whether ``config`` adapts parameters by name and no layer."""
    return bool(getattr(config, "target_parameters", None)) and not config.target_modules


def shortest(chosen: Iterable[str], names: Iterable[str]) -> list[str]:
    """The shortest list for ``target_modules`` that means exactly ``chosen`` among ``names``."""
    wanted = list(chosen)
    endings = sorted({name.rpartition(".")[2] for name in wanted})
    meant = {name for name in names if names_match(name, endings)}
    return endings if meant == set(wanted) else wanted


def in_blocks(name: str, config: TargetedConfig) -> bool:
    """Whether ``name`` lies in one of the blocks that ``config`` means."""
    if config.layers_to_transform is None or config.layers_to_transform == []:
        return True
    wanted = config.layers_to_transform
    return block_index(name, config.layers_pattern) in ([wanted] if isinstance(wanted, int) else wanted)


def _default_targets(model_type: str | None, names: Mapping[str, bool]) -> tuple[str, ...]:
    if model_type is not None and model_type in DEFAULTS:
        return DEFAULTS[model_type]
    raise TargetError(
        f"The config names no target_modules, and models of type {model_type!r} have no usual choice.",
        hint=f'Give target_modules="all-linear", or some of: {_endings(names)}.',
    )


def _endings(names: Mapping[str, bool]) -> str:
    return ", ".join(sorted({n.rpartition(".")[2] for n, linear in names.items() if linear and n}))


def _nothing(config: TargetedConfig, wanted: Any, chosen: list[str], names: Mapping[str, bool]) -> tuple[str]:
    if chosen:
        filters = [
            f"{key}={getattr(config, key)!r}"
            for key in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
            if getattr(config, key)
        ]
        return (f"target_modules={wanted!r} means {len(chosen)} modules, and {' with '.join(filters)} removes all.",)
    endings = sorted({n.rpartition(".")[2] for n in names if n})
    asked = [wanted] if isinstance(wanted, str) else list(wanted)
    near = [m for w in asked for m in difflib.get_close_matches(w.rpartition(".")[2], endings, n=2)]
    closest = f" Nearest: {', '.join(dict.fromkeys(near))}." if near else ""
    return (f"target_modules={wanted!r} matches no module.{closest} Linear layers here: {_endings(names)}.",)
