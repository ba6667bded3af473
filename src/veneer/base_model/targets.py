"""Selects the modules that a config means: by names, dotted endings, a regular expression, ``"all-linear"``, patterns.

It is used for a new adapter, and to cross-check a loaded one: the checkpoint says what it holds, the config what it
should hold.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from veneer.base_model.default_targets import default_targets
from veneer.configs.base import AnyConfig, Names, TargetedConfig
from veneer.configs.patterns import BLOCK, ENDING, WHOLE, match
from veneer.errors import TargetError

ALL_LINEAR = "all-linear"


def names_match(name: str, targets: str | Iterable[str] | None) -> bool:
    """Tell whether ``targets`` (a regular expression for the whole name, or names and dotted endings) mean ``name``."""
    if targets is None:
        return False
    if isinstance(targets, str):
        return match(targets, WHOLE, name) is not None
    return any(name == ending or name.endswith("." + ending) for ending in targets)


def block_index(name: str, patterns: str | Iterable[str] | None) -> int | None:
    """Return the index of the block that ``name`` lies in: ``model.layers.7.mlp.up_proj`` -> 7.

    ``patterns`` names the list of blocks; without it, any list counts. The outermost list wins:
    ``encoder.block.1.layer.0.SelfAttention`` -> 1.
    """
    lists = [patterns] if isinstance(patterns, str) and patterns else list(patterns or ())
    for pattern in lists or [r"[^.]*"]:
        matched = match(pattern, BLOCK, name)
        if matched:
            return int(matched["block"])
    return None


def pattern_value(name: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """Return the value of the first pattern that ``name`` ends with; ``default`` when there is none."""
    for pattern, value in patterns.items():
        if match(pattern, ENDING, name):
            return value
    return default


def is_inside(name: str, parents: Iterable[str]) -> bool:
    """Tell whether ``name`` is one of ``parents`` or lies inside one."""
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def saved_modules(config: AnyConfig, names: Iterable[str]) -> list[str]:
    """Return the modules that ``modules_to_save`` means, outermost only, in the model's order.

    As in peft, an entry means every name that ends so, whether at a dot or not: "classifier" is "pre_classifier" too.
    """
    endings = tuple(config.modules_to_save or ())
    modules: list[str] = []
    for name in names:
        if name.endswith(endings) and not is_inside(name, modules):
            modules.append(name)
    return modules


def target_names(
    config: TargetedConfig,
    names: Mapping[str, bool],
    *,
    model_type: str | None = None,
    outputs: Iterable[str] = (),
) -> list[str]:
    """Return the modules that ``config`` adapts, in the model's order.

    Args:
        config: gives ``target_modules`` and the filters.
        names: every module of the model -> whether it is a layer that "all-linear" means.
        model_type: the model's family, for a config that names nothing.
        outputs: modules that "all-linear" leaves out: the output embedding.

    Raises:
        TargetError: nothing is named and the family has no usual choice, or nothing matches.
    """
    targets = config.target_modules
    if targets is None:
        targets = default_targets(str(config.peft_type), model_type)
        if targets is None:
            raise _no_usual_choice(model_type, names)
    saved = saved_modules(config, names)
    if targets == ALL_LINEAR:
        matched = [n for n, linear in names.items() if linear and not is_inside(n, outputs)]
    else:
        matched = [n for n in names if names_match(n, targets)]
    modules = [n for n in matched if not is_inside(n, saved) and passes_filters(n, config, targets)]
    if not modules:
        raise TargetError(*_no_target(config, targets, matched, names))
    return modules


def passes_filters(name: str, config: TargetedConfig, targets: Names) -> bool:
    """Tell whether ``exclude_modules`` and the blocks of a config leave a module that ``targets`` mean."""
    if names_match(name, config.exclude_modules):
        return False
    # A layer's whole name says which block it means, and an empty list of blocks filters nothing (as in peft).
    return (not isinstance(targets, str) and name in targets) or in_blocks(name, config)


def shortest(chosen: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the shortest list for ``target_modules`` that means exactly ``chosen`` among ``names``."""
    full_names = list(chosen)
    endings = sorted({name.rpartition(".")[2] for name in full_names})
    meant = {name for name in names if names_match(name, endings)}
    return endings if meant == set(full_names) else full_names


def in_blocks(name: str, config: TargetedConfig) -> bool:
    """Tell whether ``name`` lies in one of the blocks that ``config`` means."""
    blocks = config.layers_to_transform
    if blocks is None or blocks == []:
        return True
    return block_index(name, config.layers_pattern) in ([blocks] if isinstance(blocks, int) else blocks)


def _no_usual_choice(model_type: str | None, names: Mapping[str, bool]) -> TargetError:
    return TargetError(
        "Please specify `target_modules` in `peft_config`: it names none, and models of type "
        f"{model_type!r} have no usual choice.",
        hint=f'Give target_modules="all-linear", or some of: {_endings(names)}.',
    )


def _endings(names: Mapping[str, bool]) -> str:
    return ", ".join(sorted({n.rpartition(".")[2] for n, linear in names.items() if linear and n}))


def _no_target(config: TargetedConfig, targets: Any, matched: list[str], names: Mapping[str, bool]) -> tuple[str]:
    if matched:
        filters = [
            f"{key}={shown_names(getattr(config, key))}"
            for key in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
            if getattr(config, key)
        ]
        shown, removing = shown_names(targets), " with ".join(filters)
        found_all = isinstance(targets, str) or all(any(names_match(n, [t]) for n in matched) for t in targets)
        excluded = found_all and config.exclude_modules and not config.modules_to_save
        what = "All modules were excluded" if excluded else "No modules were targeted for adaptation"
        return (
            f"{what}. This might be caused by a combination of options: target_modules={shown} means {len(matched)} "
            f"modules, and {removing} removes all.",
        )
    endings = sorted({n.rpartition(".")[2] for n in names if n})
    asked = [targets] if isinstance(targets, str) else sorted(targets)
    near = [m for target in asked for m in difflib.get_close_matches(target.rpartition(".")[2], endings, n=2)]
    closest = f" Nearest: {', '.join(dict.fromkeys(near))}." if near else ""
    filtered = "No modules were targeted for adaptation. " if config.exclude_modules or config.modules_to_save else ""
    return (
        f"{filtered}Target modules {shown_names(targets)} not found in the base model. "
        f"Please check the target modules and try again.{closest} Linear layers here: {_endings(names)}.",
    )


def shown_names(names: Any) -> str:
    """Return the text of an option's names: those of a set in a fixed order."""
    return f"{sorted(names) if isinstance(names, (set, frozenset)) else names!r}"
