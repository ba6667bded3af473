"""Keeps an embedding and an output layer that share a weight alike (``ensure_weight_tying``)."""

from __future__ import annotations

from collections.abc import Collection

from veneer.base_model.catalog import Catalog
from veneer.base_model.targets import shortest
from veneer.configs.base import AnyConfig, TargetedConfig
from veneer.errors import ConfigError, UnsupportedError


def pairs_kept_tied(config: AnyConfig, catalog: Catalog) -> list[tuple[str, str]]:
    """Return the embedding and the output layer that ``config`` wants to stay alike, in a list of pairs."""
    return catalog.tied_embeddings if getattr(config, "ensure_weight_tying", False) else []


def name_both(config: AnyConfig, catalog: Catalog) -> None:
    """Let the config of a new adapter name both layers of a pair where it names one.

    Raises:
        ConfigError: one is adapted and the other saved whole, or one is excluded.
    """
    for pair in pairs_kept_tied(config, catalog):
        assert isinstance(config, TargetedConfig)
        layers = catalog.targets(config)
        saved = catalog.whole_modules(config)
        adapted = [name for name in pair if name in layers]
        if adapted and set(pair).intersection(saved):
            raise ConfigError(
                f"ensure_weight_tying=True: {adapted[0]} is adapted, and {' and '.join(pair)} are one weight, which "
                "modules_to_save names.",
                hint="Name them in target_modules or in modules_to_save, not in both.",
            )
        missing = [name for name in pair if name not in (adapted or saved)]
        if len(missing) == 1:
            _name(config, missing[0], catalog, layers if adapted else None)


def _name(config: TargetedConfig, name: str, catalog: Catalog, layers: list[str] | None) -> None:
    """Add a module to the targets, which are ``layers``, or else to the modules that are saved whole."""
    ending = name.rpartition(".")[2]
    # The ending must mean this module alone, and modules_to_save means every name that ends so.
    short = ending if sum(other.endswith(ending) for other in catalog.modules) == 1 else name
    if layers is None:
        config.modules_to_save = [*(config.modules_to_save or ()), short]
        return
    targets = config.target_modules
    is_pattern = isinstance(targets, str) or targets is None
    config.target_modules = {*shortest([*layers, name], catalog.modules)} if is_pattern else {*(targets or ()), short}
    if name not in catalog.targets(config):
        raise ConfigError(
            f"ensure_weight_tying=True: {name} is to be adapted alike, and the config leaves it out.",
            hint="Take it out of exclude_modules, or train with ensure_weight_tying=False.",
        )


def check_both(pairs: Collection[tuple[str, str]], trained: Collection[str]) -> None:
    """Raise ``UnsupportedError`` where one layer of a pair is trained without the other."""
    for pair in pairs:
        if len(set(pair).intersection(trained)) == 1:
            raise parted(pair)


def parted(pair: tuple[str, str]) -> UnsupportedError:
    """Return the error for a pair that is to be trained alike and cannot be."""
    return UnsupportedError(
        f"ensure_weight_tying=True: {' and '.join(pair)} share a weight, and this adapter does not change both alike.",
        hint="Train with ensure_weight_tying=False; or, if they are to stay alike, without use_dora, variants of LoRA "
        "and patterns for one of them. An adapter that was trained so loads without is_trainable.",
    )
