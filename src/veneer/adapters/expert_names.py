"""Names fused expert parameters in a new adapter's config where it names the layers that they were."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from veneer.base_model.catalog import Catalog
from veneer.base_model.sites import is_router
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import (
    ALL_LINEAR,
    in_blocks,
    is_inside,
    names_match,
    pattern_value,
    saved_modules,
    shortest,
)
from veneer.configs.base import TargetedConfig
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import TargetError, VeneerError
from veneer.printing import warn

# Parameter -> the layers of one expert whose weights it holds, each with all its names.
HELD: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")),
    "down_proj": (("down_proj", "w2"),),
}


@dataclass(frozen=True)
class Share:
    """The LoRA of one parameter: the parameter's name, rank and scale, and the layers that it stands for."""

    name: str
    rank: int
    scale: float
    layers: tuple[str, ...]


def name_experts(config: TargetedConfig, catalog: Catalog, check: Callable[[Site], object]) -> list[str]:
    """Name the experts and routers that ``config`` targets as parameters, in ``config`` itself.

    Args:
        config: of a new adapter.
        catalog: the model's modules.
        check: raises where an adapter of that config cannot be on a site.

    Returns:
        The names of all layers that are held by parameters. There is a warning for those that are left out.

    Raises:
        TargetError: gate and up, which are one matrix, are to have different scales.
    """
    stacks = [name for name, module in catalog.modules.items() if _holds_experts(module)]
    routers = [name for name in catalog.modules if _is_router(name, catalog)]
    held = [f"{stack}.0.{name}" for stack in stacks for parts in HELD.values() for names in parts for name in names]
    halves: list[str] = []
    shares = [share for name in stacks for share in _shares(config, name, catalog, halves)]
    shares += [_router(config, name) for name in routers if _targets(config, name, catalog)]
    _warn_of_left_out(config, catalog, halves)
    if not shares:
        return held
    try:
        if not isinstance(config, LoraConfig):
            raise TargetError(f"{config.peft_type} adapts no parameters.")
        check(catalog.parameter_sites([shares[0].name])[0])
    except VeneerError as error:
        warn(f"The experts ({shares[0].name} ...) are left out: {error.message}")
    else:
        _name(config, shares, catalog)
    return held


def _holds_experts(module: nn.Module) -> bool:
    """Tell whether a module holds experts' matrices as their layers had them: ``(experts, out, in)``, gate above up."""
    both, down = (module._parameters.get(name) for name in HELD)
    if both is None or down is None or both.ndim != 3 or down.ndim != 3:
        return False
    experts, inner = both.shape[0], both.shape[1] // 2
    return not getattr(module, "is_transposed", False) and down.shape == (experts, both.shape[2], inner)


def _is_router(name: str, catalog: Catalog) -> bool:
    module = catalog.modules[name]
    weight = module._parameters.get("weight")
    is_one = name.endswith(".gate") or is_router(module)
    return is_one and weight is not None and weight.ndim == 2 and not catalog.sites_at(name)


def _targets(config: TargetedConfig, name: str, catalog: Catalog) -> bool:
    """Tell whether a config would adapt a layer of that name."""
    targets = config.target_modules
    return (
        (targets == ALL_LINEAR or names_match(name, targets))
        and not names_match(name, config.exclude_modules)
        and not is_inside(name, saved_modules(config, catalog.modules))
        and in_blocks(name, config)
    )


def _shares(config: TargetedConfig, stack: str, catalog: Catalog, halves: list[str]) -> list[Share]:
    """Return the LoRAs of a module's parameters; layers of a matrix of which a config targets half join ``halves``."""
    shares = []
    for parameter, parts in HELD.items():
        named = [[f"{stack}.0.{own}" for own in names] for names in parts]
        targeted = [[layer for layer in layers if _targets(config, layer, catalog)] for layers in named]
        if all(targeted):
            layers = [layers[0] for layers in targeted]
            ranks, scales = zip(*(_rank_and_scale(config, layer) for layer in layers), strict=True)
            if len(set(scales)) > 1:
                raise TargetError(
                    f"{' and '.join(layers)} are one matrix now, {stack}.{parameter}, and have scales of their own.",
                    hint="Give both the same rank and alpha, or name the parameter in target_parameters.",
                )
            every = tuple(layer for layers in targeted for layer in layers)
            shares.append(Share(f"{stack}.{parameter}", sum(ranks), scales[0], every))
        else:
            halves += [layer for layers in targeted for layer in layers]
    return shares


def _warn_of_left_out(config: TargetedConfig, catalog: Catalog, halves: list[str]) -> None:
    """Warn of experts that the config's names do not reach."""
    if halves:
        warn(
            f"The experts are left out of {halves[0].rpartition('.')[2]!r}: gate and up are one matrix there. Name "
            "both, or gate_up_proj in target_parameters."
        )
    others = [
        f"{name}.{parameter}"
        for name, module in catalog.modules.items()
        for parameter, value in module._parameters.items()
        if value is not None and value.ndim == 3 and name.endswith("experts") and not _holds_experts(module)
    ]
    if config.target_modules == ALL_LINEAR and others and not getattr(config, "target_parameters", None):
        warn(f'"all-linear" leaves out the experts, which are parameters ({others[0]} ...): see target_parameters.')


def _router(config: TargetedConfig, name: str) -> Share:
    return Share(f"{name}.weight", *_rank_and_scale(config, name), (name,))


def _rank_and_scale(config: TargetedConfig, layer: str) -> tuple[int, float]:
    if not isinstance(config, LoraConfig):
        return 0, 0.0
    rank = pattern_value(layer, config.rank_pattern, config.r)
    alpha = pattern_value(layer, config.alpha_pattern, config.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _name(config: LoraConfig, shares: list[Share], catalog: Catalog) -> None:
    """Put the parameters into a config, with their ranks and alphas first among the patterns."""
    endings = _endings(shares, catalog)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for ending, share in zip(endings, shares, strict=True):
        # As peft writes them.
        key = re.escape(share.name) if ending == share.name else rf".*\.{re.escape(ending)}"
        alpha = share.scale * (math.sqrt(share.rank) if config.use_rslora else share.rank)
        ranks |= {key: share.rank} if share.rank != config.r else {}
        alphas |= {key: alpha} if not math.isclose(alpha, config.lora_alpha) else {}
    config.rank_pattern = {**ranks, **config.rank_pattern}
    config.alpha_pattern = {**alphas, **config.alpha_pattern}
    config.target_parameters = list(dict.fromkeys([*(config.target_parameters or ()), *endings]))
    targets = config.target_modules
    if isinstance(targets, (set, list)):
        stood_for = [layer for share in shares for layer in share.layers]
        config.target_modules = {name for name in targets if not _is_spent(name, stood_for, catalog)}
    elif targets is not None and targets != ALL_LINEAR:
        parameters = [share.name.rpartition(".")[0] for share in shares]
        layers = [name for name in catalog.modules if names_match(name, targets) and not is_inside(name, parameters)]
        config.target_modules = set(shortest(layers, catalog.modules))


def _endings(shares: list[Share], catalog: Catalog) -> list[str]:
    """Return for each share an ending that matches only parameters of its rank and scale, or its whole name."""
    names = [f"{name}.{leaf}" for name, module in catalog.modules.items() for leaf in module._parameters]
    matched: dict[str, set[str]] = {}

    def ending_of(share: Share) -> str:
        alike = {other.name for other in shares if (other.rank, other.scale) == (share.rank, share.scale)}
        for parts in (1, 2, 3):
            ending = ".".join(share.name.split(".")[-parts:])
            if ending not in matched:
                matched[ending] = {name for name in names if names_match(name, [ending])}
            if matched[ending] <= alike:
                return ending
        return share.name

    return [ending_of(share) for share in shares]


def _is_spent(name: str, layers: Iterable[str], catalog: Catalog) -> bool:
    """Tell whether a name of ``target_modules`` matches only layers that parameters stand for."""
    modules = [module for module in catalog.modules if names_match(module, [name])]
    return all(_is_router(module, catalog) for module in modules) and any(
        names_match(layer, [name]) for layer in layers
    )
