"""Embedding and output layer that share a weight and are to stay alike (``ensure_weight_tying``)."""

from __future__ import annotations

from collections.abc import Collection

from veneer.base_model.catalog import Catalog
from veneer.base_model.targets import only_parameters, shortest
from veneer.configs.base import AnyConfig, TargetedConfig
from veneer.errors import ConfigError, UnsupportedError


def pairs_kept_tied(config: AnyConfig, catalog: Catalog) -> list[tuple[str, str]]:
    """The embedding and the output layer that ``config`` has stay alike."""
    return catalog.tied_embeddings if getattr(config, "ensure_weight_tying", False) else []


def name_both(config: AnyConfig, catalog: Catalog) -> None:
    """Let the config of a new adapter name both ends where it names one.

    Raises:
        ConfigError: one end is adapted and the other saved whole, or one is excluded.
    """
    for pair in pairs_kept_tied(config, catalog):
        assert isinstance(config, TargetedConfig)
        layers = [] if only_parameters(config) else catalog.targets(config)
        saved = catalog.whole_modules(config)
        adapted = [name for name in pair if name in layers]
        if adapted and set(pair).intersection(saved):
            raise ConfigError(
                f"ensure_weight_tying=True: {adapted[0]} is adapted, and {' and '.join(pair)} are one weight, which "
                "modules_to_save names.",
                hint="Name them in target_modules or in modules_to_save, not in both.",
            )
        other = [name for name in pair if name not in (adapted or saved)]
        if len(other) == 1:
            _name(config, other[0], catalog, layers if adapted else None)


def _name(config: TargetedConfig, name: str, catalog: Catalog, layers: list[str] | None) -> None:
    """Name one module more, among the targets (which are ``layers``) or the modules that are saved whole."""
    ending = name.rpartition(".")[2]
    # Either option must mean this one by it, and modules_to_save means whatever ends so.
    short = ending if sum(other.endswith(ending) for other in catalog.modules) == 1 else name
    if layers is None:
        config.modules_to_save = [*(config.modules_to_save or ()), short]
        return
    wanted = config.target_modules
    spelt = isinstance(wanted, str) or wanted is None
    config.target_modules = shortest([*layers, name], catalog.modules) if spelt else [*(wanted or ()), short]
    if name not in catalog.targets(config):
        raise ConfigError(
            f"ensure_weight_tying=True: {name} is to be adapted alike, and the config leaves it out.",
            hint="Take it out of exclude_modules, or train with ensure_weight_tying=False.",
        )


def check_both(pairs: Collection[tuple[str, str]], trained: Collection[str]) -> None:
    """Raise ``UnsupportedError`` where one end is trained without the other."""
    for pair in pairs:
        if len(set(pair).intersection(trained)) == 1:
            raise parted(pair)


def parted(pair: tuple[str, str]) -> UnsupportedError:
    """The error for two ends that are to be trained alike and cannot be."""
    return UnsupportedError(
        f"ensure_weight_tying=True: {' and '.join(pair)} share a weight, and this adapter does not change both alike.",
        hint="Train with ensure_weight_tying=False; or, if they are to stay alike, without use_dora, variants of LoRA "
        "and patterns for one of them. An adapter that was trained so loads without is_trainable.",
    )
