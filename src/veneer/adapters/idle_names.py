"""Warns of names in a new adapter's config that mean nothing in the model."""

from __future__ import annotations

from collections.abc import Iterable

from veneer.base_model.catalog import Catalog
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import ALL_LINEAR, block_index, names_match
from veneer.configs import patterns
from veneer.configs.base import Names, TargetedConfig
from veneer.errors import did_you_mean
from veneer.printing import IdleNameWarning, warn


def warn_of_idle_names(config: TargetedConfig, catalog: Catalog, experts: Iterable[str], sites: Iterable[Site]) -> None:
    """Warn of each name in a config that means nothing.

    Args:
        config: of a new adapter, as it was given.
        catalog: the model's modules.
        experts: the layers of experts that are no modules now, and that parameters stand for.
        sites: the places that the adapter is on.
    """
    sites, experts = list(sites), list(experts)
    names = [*catalog.modules, *experts]
    parameters = {name for module in catalog.modules.values() for name in module._parameters}
    for name in (idle := _idle(config.target_modules, names)):
        more = " It is a parameter: see target_parameters." if name in parameters else ""
        more += _none_matched("target_modules", config.target_modules, idle, "module")
        _warn(_text("target_modules", name, "module of the model", [] if more else names) + more)
    for name in _idle(config.exclude_modules, names):
        text = _text("exclude_modules", name, "module of the model", names)
        _warn(
            f"{text} You have passed exclude_modules={config.exclude_modules!r} but no modules were excluded by that."
        )
    _warn_of_idle_parameters(config, catalog)
    _warn_of_idle_patterns(config, names, [*experts, *(site.pattern_name for site in sites)])
    _warn_of_idle_blocks(config, sites)


def _idle(targets: str | Iterable[str] | None, names: list[str]) -> list[str]:
    """Return the names of a list that mean none of ``names``; a regular expression counts as one."""
    if targets is None or targets == ALL_LINEAR:
        return []
    entries = {targets: targets} if isinstance(targets, str) else {name: [name] for name in sorted(targets)}
    return [name for name, entry in entries.items() if not any(names_match(other, entry) for other in names)]


def _warn_of_idle_parameters(config: TargetedConfig, catalog: Catalog) -> None:
    targets = getattr(config, "target_parameters", None)
    if not targets:
        return
    names = [f"{name}.{leaf}" for name, module in catalog.modules.items() for leaf in module._parameters]
    for name in (idle := _idle(targets, names)):
        none = _none_matched("target_parameters", targets, idle, "parameter")
        _warn(_text("target_parameters", name, "parameter of the model", names) + none)


def _none_matched(option: str, targets: Names | None, idle: list[str], what: str) -> str:
    """Return the sentence for an option none of whose names means anything; nothing for another one."""
    alone = isinstance(targets, str) or len(idle) == len({*(targets or ())})
    return f" {option}={targets!r} were set but no {what} was matched." if alone else ""


def _warn_of_idle_patterns(config: TargetedConfig, names: list[str], adapted: list[str]) -> None:
    for option in ("rank_pattern", "alpha_pattern"):
        for name in getattr(config, option, None) or ():
            if _means(name, config.pattern_form, adapted):
                continue
            known = _means(name, config.pattern_form, names)
            what = "layer that the adapter is on" if known else "module of the model"
            text = _text(option, name, what, [] if known else names)
            _warn(f"{text} The keys of {option} {[name]} did not match any targeted module.")


def _means(pattern: str, form: patterns.Form, names: Iterable[str]) -> bool:
    return any(patterns.match(pattern, form, name) for name in names)


def _warn_of_idle_blocks(config: TargetedConfig, sites: list[Site]) -> None:
    blocks = config.layers_to_transform
    named = [blocks] if isinstance(blocks, int) else blocks or []
    adapted = {block_index(f"{site.name}.", config.layers_pattern) for site in sites}
    for block in named:
        if block not in adapted:
            _warn(f"layers_to_transform names block {block}, and no target is there.")


def _warn(text: str) -> None:
    warn(text, IdleNameWarning)


def _text(option: str, name: str, what: str, names: Iterable[str]) -> str:
    endings = {ending for other in names if (ending := other.rpartition(".")[2]) and not ending.isdigit()}
    question = did_you_mean(name.rpartition(".")[2], sorted(endings))
    return f"{option} names {name!r}, and no {what}. {question}".rstrip()
