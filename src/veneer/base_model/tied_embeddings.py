"""Keeps an embedding and the layers that share its weight alike (``ensure_weight_tying``)."""

from __future__ import annotations

from collections.abc import Collection

from veneer.base_model.catalog import Catalog
from veneer.base_model.targets import shortest
from veneer.configs.base import AnyConfig, TargetedConfig
from veneer.configs.methods.trainable_tokens import TrainableTokensConfig
from veneer.errors import ConfigError, TargetError, UnsupportedError
from veneer.printing import warn


def pairs_kept_tied(config: AnyConfig, catalog: Catalog) -> list[tuple[str, str]]:
    """Return the embedding and each layer that ``config`` wants to stay alike, in a list of pairs."""
    return _pairs(catalog) if getattr(config, "ensure_weight_tying", False) else []


def _pairs(catalog: Catalog) -> list[tuple[str, str]]:
    """Return the embedding and each layer that shares its weight, where the model's config says that they are tied."""
    says = getattr(getattr(catalog.model, "config", None), "tie_word_embeddings", None)
    return [] if says is False else catalog.tied_embeddings


def name_all(config: AnyConfig, catalog: Catalog) -> None:
    """Let the config of a new adapter name all layers that share the embedding's weight, where it names one of them.

    Raises:
        ConfigError: one is adapted and another saved whole, or one is excluded.
    """
    if not isinstance(config, TargetedConfig):
        return
    group = list(dict.fromkeys(name for pair in _pairs(catalog) for name in pair))
    layers = _layers(config, catalog)
    adapted, saved = ([name for name in group if name in names] for names in (layers, catalog.whole_modules(config)))
    keeps = getattr(config, "ensure_weight_tying", None)
    _warn(config, keeps, group, adapted or saved)
    if not keeps or not (adapted or saved):
        return
    if adapted and saved:
        raise ConfigError(
            f"ensure_weight_tying=True: {adapted[0]} is adapted, and {' and '.join(group)} are one weight, which "
            "modules_to_save names.",
            hint="Name them in target_modules or in modules_to_save, not in both.",
        )
    for name in group:
        if name not in (adapted or saved):
            _name(config, name, catalog, layers if adapted else None)


def _layers(config: TargetedConfig, catalog: Catalog) -> list[str]:
    """Return the layers that a config adapts; none where the method has yet to choose them."""
    try:
        return catalog.targets(config)
    except TargetError:
        return []


def _warn(config: TargetedConfig, keeps: bool | None, group: list[str], trained: list[str]) -> None:
    """Warn of layers that share a weight and will part, and of a wish to keep them tied that has no object."""
    tokens = getattr(config, "trainable_token_indices", None)
    if keeps and not group and tokens:
        warn("ensure_weight_tying=True but the model does not have tied weights.")
    elif keeps and not group:
        warn("`ensure_weight_tying` is set to True, but no tied modules were found in the model.")
    elif keeps and not trained and not tokens:
        warn(
            "`ensure_weight_tying` is set to True, but no tied modules are added in `modules_to_save` or "
            f"`target_modules`: these are {', '.join(group)}."
        )
    elif group and trained and not keeps and not isinstance(config, TrainableTokensConfig):
        why = (
            f"no implementation exists to tie the adapters of {config.peft_type}"
            if keeps is None
            else "`ensure_weight_tying` is not set to True"
        )
        warn(
            f"{' and '.join(trained)}: the base shares this weight among {', '.join(group)}, and {why}. They are "
            "trained apart, and a merge unties them."
        )


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
