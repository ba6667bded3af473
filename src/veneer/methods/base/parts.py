"""The companions of an adapter in a checkpoint, whatever its method: biases, and embeddings saved whole."""

from __future__ import annotations

from typing import Any

from veneer.base_model.catalog import Catalog
from veneer.configs.base import TargetedConfig
from veneer.errors import UnsupportedError
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
        UnsupportedError: ``bias`` is none of its choices. TargetError: the config means no layer of the model.
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
        UnsupportedError: ``bias`` is neither ``"none"``, ``"all"`` nor ``"<method>_only"``.
    """
    ends = [site for site in part.sites if catalog.is_embedding(site.name)]
    # These are the base's own rows, so all layers that share them get them.
    parts = [MethodOnSites(SAVED_WEIGHT, ends, {site.id: catalog.sharing(site.name) for site in ends}, optional=True)]
    bias = getattr(config, "bias", "none")
    if bias not in ("none", "all") and not bias.endswith("_only"):
        method = str(config.peft_type).lower()
        raise UnsupportedError(
            f"bias={bias!r} is none of the choices.", hint=f'They are "none", "all", "{method}_only".'
        )
    if bias == "none":
        parts.append(MethodOnSites(SAVED_BIAS, [site for site in ends if site.bias is not None], optional=True))
    else:
        biased, inner = [site for site in part.sites if site.bias is not None], catalog.inner_bias_sites(part.sites)
        parts.append(MethodOnSites(ADAPTED_BIAS, [*biased, *inner]))
    if bias == "all":
        others = catalog.bias_sites(config, without=part.sites)
        parts.append(MethodOnSites(OTHER_BIAS, others, catalog.bias_twins([*biased, *others])))
    # The adapter's own change comes last, for it may start from the trained bias.
    return [*parts, part]
