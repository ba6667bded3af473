"""Translates a config from the module names of an older version of transformers to the names of now.

A config names modules by endings, regular expressions and patterns, which hold for the old names. So each is matched
against the old names, and written anew where it matches other modules by their names of now.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from veneer.base_model.catalog import Catalog
from veneer.base_model.targets import names_match, pattern_value, saved_modules, shortest, target_names
from veneer.configs.base import TargetedConfig
from veneer.errors import TargetError

# Option with patterns -> the options with the value of a module that no pattern matches.
_PATTERNS = {"rank_pattern": ("r",), "alpha_pattern": ("lora_alpha", "alpha")}
_LORA_E = "lora_E"
_INDEX = "#"
_Kind = tuple[str, ...]


class OldNames:
    """Holds the old name of each module of a model; the adapter's modules in one layer tell those of all layers.

    Args:
        moved: old name -> name now, of the modules that the adapter has.
        names: the names of all modules.

    Attributes:
        now: old name -> name now, in the model's order; the same where nothing tells another.
    """

    def __init__(self, moved: Mapping[str, str], names: Iterable[str]) -> None:
        self._kinds: dict[_Kind, _Kind] = {}
        for old, new in moved.items():
            for before, after in _with_parents(old, new):
                if before.count(_INDEX) == after.count(_INDEX):
                    self._kinds.setdefault(after, before)
        self.now: dict[str, str] = {}
        for name in names:
            self.now.setdefault(self._old(name), name)

    def _old(self, name: str) -> str:
        words = name.split(".")
        before = self._kinds.get(_kind(words))
        if before is None:
            return name
        indices = iter([word for word in words if word.isdigit()])
        return ".".join(next(indices) if word == _INDEX else word for word in before)

    def matched(self, targets: Any) -> list[str]:
        """Return the modules, by their names now, whose old names an expression or a list of endings matches."""
        return [new for old, new in self.now.items() if names_match(old, targets)]


def _kind(words: Iterable[str]) -> _Kind:
    """Return a name without its indices, which is the same for all blocks of a model."""
    return tuple(_INDEX if word.isdigit() else word for word in words)


def _with_parents(old: str, new: str) -> Iterator[tuple[_Kind, _Kind]]:
    """Yield a pair of names, and the pairs of the modules above, as long as both end alike."""
    before, after = old.split("."), new.split(".")
    yield _kind(before), _kind(after)
    while len(before) > 1 and len(after) > 1 and before[-1] == after[-1]:
        before, after = before[:-1], after[:-1]
        yield _kind(before), _kind(after)


def kinds_of(moved: Mapping[str, str]) -> list[str]:
    """Summarise the moves for a note: the beginnings of names, before and now."""
    kinds = set()
    for old, new in moved.items():
        before, after = _kind(old.split(".")), _kind(new.split("."))
        while before and after and before[-1] == after[-1]:
            before, after = before[:-1], after[:-1]
        kinds.add(f"{'.'.join(before) or '(none)'} -> {'.'.join(after) or '(none)'}")
    return sorted(kinds)


def as_named_now(config: TargetedConfig, names: OldNames, adapted: Collection[str], catalog: Catalog) -> TargetedConfig:
    """Return a config with every name in it as it is now.

    Args:
        config: the config as it was written.
        names: the old names.
        adapted: the modules that the adapter has, by their names now.
        catalog: the model's modules.
    """
    changes: dict[str, Any] = {}
    if config.modules_to_save:
        saved = [new for name in config.modules_to_save for new in _saved_now(config, name, names, catalog)]
        changes["modules_to_save"] = list(dict.fromkeys(saved))
    for option, defaults in _PATTERNS.items():
        if getattr(config, option, None):
            default = next((getattr(config, name) for name in defaults if hasattr(config, name)), None)
            changes[option] = _patterns(getattr(config, option), default, names, adapted)
    feedforward = getattr(config, "feedforward_modules", None)
    if feedforward and set(names.matched(feedforward)) != _matching(feedforward, catalog.modules):
        # An expression, since names have to be among the targets, which are renamed after this.
        changes["feedforward_modules"] = "|".join(map(re.escape, names.matched(feedforward)))
    tokens = getattr(config, "trainable_token_indices", None)
    if isinstance(tokens, Mapping):
        changes["trainable_token_indices"] = {
            ending: value for name, value in tokens.items() for ending in _ending(name, names, catalog)
        }
    return _targets(config, replace(config, **changes), names, catalog)


def _targets(config: TargetedConfig, now: TargetedConfig, names: OldNames, catalog: Catalog) -> TargetedConfig:
    """Return ``now`` with targets that match the same modules as those of ``config`` matched by the old names."""
    if config.target_modules is None or not any(old != new for old, new in names.now.items()):
        return now
    olds = {old: catalog.linear[new] for old, new in names.now.items()}
    outputs = [old for old, new in names.now.items() if new in catalog.output_embeddings]
    try:
        targets = [names.now[old] for old in target_names(config, olds, outputs=outputs)]
    except TargetError:
        return now
    if targets == _targeted(now, catalog):
        return now
    # All filters have been applied: the list says everything.
    unfiltered: dict[str, Any] = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    return replace(now, target_modules=shortest(targets, catalog.modules), **unfiltered)


def _targeted(config: TargetedConfig, catalog: Catalog) -> list[str]:
    try:
        return catalog.targets(config)
    except TargetError:
        return []


def _matching(targets: Any, modules: Iterable[str]) -> set[str]:
    return {name for name in modules if names_match(name, targets)}


def _ending(name: str, names: OldNames, catalog: Catalog) -> list[str]:
    """Return the names of now for one name of a config: itself where it matches the same modules."""
    modules = names.matched([name])
    is_other = modules and set(modules) != _matching([name], catalog.modules)
    return shortest(modules, catalog.modules) if is_other else [name]


def _saved_now(config: TargetedConfig, name: str, names: OldNames, catalog: Catalog) -> list[str]:
    """Return the names of now for one name in ``modules_to_save``."""
    alone = replace(config, modules_to_save=[name])
    modules = [names.now[old] for old in saved_modules(alone, names.now)]
    return modules if modules and modules != catalog.whole_modules(alone) else [name]


def _patterns(patterns: Mapping[str, Any], default: Any, names: OldNames, adapted: Collection[str]) -> dict[str, Any]:
    """Return patterns (ending -> value), with those first that give a module the value that it had by its old name."""
    if any(isinstance(value, list) for value in patterns.values()):  # AdaLoRA's: a layer's own name -> its ranks
        whole = {f"{old}.{_LORA_E}": f"{new}.{_LORA_E}" for old, new in names.now.items()}
        return {whole.get(name, name): value for name, value in patterns.items()}
    changed: dict[Any, list[str]] = {}
    for old, new in names.now.items():
        value = pattern_value(old, patterns, default)
        if new in adapted and value != pattern_value(new, patterns, default):
            changed.setdefault(value, []).append(new)
    added = {ending: value for value, modules in changed.items() for ending in shortest(modules, adapted)}
    return {**added, **patterns}
