"""The companions of an adapter in a checkpoint, whatever its method: biases, and embeddings saved whole."""

from __future__ import annotations

from typing import Any

from veneer.base_model.catalog import Catalog
from veneer.configs.base import TargetedConfig
from veneer.errors import ConfigError
from veneer.methods.base.abilities import ChoosesLayers, specialised
from veneer.methods.base.method import AnyMethod, Method, MethodOnSites
from veneer.methods.base.prompt_method import AnyPrompt
from veneer.methods.base.replaced_weight import SAVED_BIAS, SAVED_WEIGHT
from veneer.methods.base.trained_bias import ADAPTED_BIAS, OTHER_BIAS


def parts_of(method: AnyMethod | AnyPrompt, config: Any, catalog: Catalog) -> list[MethodOnSites]:
    """Return a method's parts for a config and those of their companions, in the order in which they apply.

    Args:
        method: the method, or a prompt's, which has no parts.
        config: its config.
        catalog: the base model.

    Raises:
        ConfigError: ``bias`` is none of its choices. TargetError: the config means no layer of the model.
    """
    parts: list[MethodOnSites] = []
    for part in _own_parts(method, config, catalog):
        parts += _with_companions(part, config, catalog) if part.companions else [part]
    return parts


def _own_parts(method: AnyMethod | AnyPrompt, config: Any, catalog: Catalog) -> list[MethodOnSites]:
    """Return the parts of a method without their companions; a prompt has none."""
    if isinstance(method, ChoosesLayers):
        return method.parts(config, catalog)
    if isinstance(method, Method):
        return [MethodOnSites(specialised(method, config), catalog.sites(config), companions=True)]
    return []


def _with_companions(part: MethodOnSites, config: TargetedConfig, catalog: Catalog) -> list[MethodOnSites]:
    """Return ``own`` and the parts of its companions, in the order in which they apply.

    Raises:
        ConfigError: ``bias`` is neither ``"none"``, ``"all"`` nor ``"<method>_only"``.
    """
    ends = [site for site in part.sites if catalog.is_embedding(site.name)]
    # These are the base's own rows, so all layers that share them get them.
    parts = [
        MethodOnSites(SAVED_WEIGHT, ends, {site.id: catalog.sharing(site.name) for site in ends}, optional=True),
        part,
    ]
    bias = getattr(config, "bias", "none")
    if bias not in ("none", "all") and not bias.endswith("_only"):
        method = str(config.peft_type).lower()
        raise ConfigError(f"bias={bias!r} is none of the choices.", hint=f'They are "none", "all", "{method}_only".')
    if bias == "none":
        parts.append(MethodOnSites(SAVED_BIAS, [site for site in ends if site.bias is not None], optional=True))
    else:
        parts.append(MethodOnSites(ADAPTED_BIAS, [site for site in part.sites if site.bias is not None]))
    if bias == "all":
        parts.append(MethodOnSites(OTHER_BIAS, catalog.bias_sites(config, without=part.sites)))
    return parts
