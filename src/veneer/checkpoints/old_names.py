"""What modules were called when an adapter was made, and its config under the names that they have now.

A config names modules by endings, regular expressions and patterns, which mean something under the old names only. Each
is therefore asked under the old names what it means, and written anew where it means something else under those of now.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from veneer.base_model.catalog import Catalog
from veneer.base_model.targets import names_match, pattern_value, saved_modules, shortest, target_names
from veneer.configs.base import TargetedConfig
from veneer.errors import TargetError

# What a pattern's name may end with, and the options that hold for a module that it does not mean.
_PATTERNS = {"rank_pattern": ("r",), "alpha_pattern": ("lora_alpha", "alpha")}
_LORA_E = "lora_E"
_INDEX = "#"
_Kind = tuple[str, ...]


class OldNames:
    """The old name of each module of a model, as far as an adapter's own tell: those of one layer hold for all.

    Args:
        moved: a module's old name -> its name now, for those that the adapter has.
        names: of all modules.

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

    def meant(self, wanted: Any) -> list[str]:
        """The modules, by their names now, that an expression or a list of endings meant."""
        return [new for old, new in self.now.items() if names_match(old, wanted)]


def _kind(words: Iterable[str]) -> _Kind:
    """A name with no index in it: what the blocks of a model have in common."""
    return tuple(_INDEX if word.isdigit() else word for word in words)


def _with_parents(old: str, new: str) -> Iterator[tuple[_Kind, _Kind]]:
    """A pair of names, and the pairs of the modules above, as long as both end alike."""
    before, after = old.split("."), new.split(".")
    yield _kind(before), _kind(after)
    while len(before) > 1 and len(after) > 1 and before[-1] == after[-1]:
        before, after = before[:-1], after[:-1]
        yield _kind(before), _kind(after)


def kinds_of(moved: Mapping[str, str]) -> list[str]:
    """The moves in few words, for a note: what a name began with, before and now."""
    told = set()
    for old, new in moved.items():
        before, after = _kind(old.split(".")), _kind(new.split("."))
        while before and after and before[-1] == after[-1]:
            before, after = before[:-1], after[:-1]
        told.add(f"{'.'.join(before) or '(none)'} -> {'.'.join(after) or '(none)'}")
    return sorted(told)


def as_named_now(config: TargetedConfig, names: OldNames, held: Collection[str], catalog: Catalog) -> TargetedConfig:
    """``config`` with every name in it as it is now.

    Args:
        config: as it was written.
        names: the old names.
        held: the modules that the adapter has, by their names now.
        catalog: the model's modules.
    """
    changes: dict[str, Any] = {}
    if config.modules_to_save:
        kept = [one for name in config.modules_to_save for one in _saved_now(config, name, names, catalog)]
        changes["modules_to_save"] = list(dict.fromkeys(kept))
    for option, defaults in _PATTERNS.items():
        if getattr(config, option, None):
            default = next((getattr(config, name) for name in defaults if hasattr(config, name)), None)
            changes[option] = _patterns(getattr(config, option), default, names, held)
    feedforward = getattr(config, "feedforward_modules", None)
    if feedforward and set(names.meant(feedforward)) != _matching(feedforward, catalog.modules):
        changes["feedforward_modules"] = shortest(names.meant(feedforward), catalog.modules)
    tokens = getattr(config, "trainable_token_indices", None)
    if isinstance(tokens, Mapping):
        changes["trainable_token_indices"] = {
            ending: value for name, value in tokens.items() for ending in _ending(name, names, catalog)
        }
    return _targets(config, replace(config, **changes), names, catalog)


def _targets(config: TargetedConfig, now: TargetedConfig, names: OldNames, catalog: Catalog) -> TargetedConfig:
    """``now`` with targets that mean under today's names what those of ``config`` meant under the old."""
    if config.target_modules is None or not any(old != new for old, new in names.now.items()):
        return now
    olds = {old: catalog.linear[new] for old, new in names.now.items()}
    outputs = [old for old, new in names.now.items() if new in catalog.output_embeddings]
    try:
        meant = [names.now[old] for old in target_names(config, olds, outputs=outputs)]
    except TargetError:
        return now
    if meant == _targeted(now, catalog):
        return now
    # All filters have been applied: the list says everything.
    free: dict[str, Any] = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    return replace(now, target_modules=shortest(meant, catalog.modules), **free)


def _targeted(config: TargetedConfig, catalog: Catalog) -> list[str]:
    try:
        return catalog.targets(config)
    except TargetError:
        return []


def _matching(wanted: Any, modules: Iterable[str]) -> set[str]:
    return {name for name in modules if names_match(name, wanted)}


def _ending(name: str, names: OldNames, catalog: Catalog) -> list[str]:
    """One name of a config as it is now: itself where it means the same."""
    meant = names.meant([name])
    return shortest(meant, catalog.modules) if meant and set(meant) != _matching([name], catalog.modules) else [name]


def _saved_now(config: TargetedConfig, name: str, names: OldNames, catalog: Catalog) -> list[str]:
    """The same for a module that is saved whole."""
    one = replace(config, modules_to_save=[name])
    meant = [names.now[old] for old in saved_modules(one, names.now)]
    return meant if meant and meant != catalog.whole_modules(one) else [name]


def _patterns(patterns: Mapping[str, Any], default: Any, names: OldNames, held: Collection[str]) -> dict[str, Any]:
    """``patterns`` (what a name ends with -> a value), with what they say otherwise under today's names put first."""
    if any(isinstance(value, list) for value in patterns.values()):  # AdaLoRA's: a layer's own name -> its ranks
        whole = {f"{old}.{_LORA_E}": f"{new}.{_LORA_E}" for old, new in names.now.items()}
        return {whole.get(name, name): value for name, value in patterns.items()}
    odd: dict[Any, list[str]] = {}
    for old, new in names.now.items():
        value = pattern_value(old, patterns, default)
        if new in held and value != pattern_value(new, patterns, default):
            odd.setdefault(value, []).append(new)
    found = {ending: value for value, own in odd.items() for ending in shortest(own, held)}
    return {**found, **patterns}
