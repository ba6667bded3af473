"""Adaption prompts: upper layers attend to trained vectors (LLaMA-Adapter, Zhang et al. 2023, arXiv:2303.16199).

    y' = y + W_o (g * softmax(q K^T / sqrt(dim)) V)        K = W_k P, V = W_v P

    P: (1, adapter_len, hidden); g: (1,), zero at the start, so that nothing changes

``q`` is the layer's own queries, turned by their positions; ``K`` and ``V`` have none. The vectors have a softmax of
their own, so they take no attention from the text (section 3.2). In GPT-2 there is no ``W_o``, and elsewhere a bias of
``W_o`` is added a second time: so it is in peft, and so checkpoints are trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.base_model.sites.attention import FORMS, AttentionSite, attention_site
from veneer.base_model.sites.site import Site
from veneer.configs.methods.adaption_prompt import AdaptionPromptConfig
from veneer.errors import ConfigError, TargetError
from veneer.methods.base.abilities import ChoosesLayers, CompletesConfig
from veneer.methods.base.method import BaseLayer, Leaf, MethodOnSites, NewLayer
from veneer.methods.base.routed_method import RoutedMethod
from veneer.patches.patch import Patch

if TYPE_CHECKING:
    from veneer.base_model.catalog import Catalog

PROMPT = "adaption_prompt"
GATE = "adaption_gate"


@dataclass(frozen=True)
class AdaptionPromptRoute:
    """Lets the queries of one attention module, ``(rows, length, heads, dim)``, attend to the trained vectors."""

    prompt: Tensor
    gate: Tensor
    site: AttentionSite

    def changes(self) -> bool:
        return bool(self.gate.count_nonzero())

    def take(self, rows: Tensor, whole: torch.Size) -> AdaptionPromptRoute:
        return self

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        keys, values = self.site.keys_and_values(self.prompt.to(x.dtype))
        groups = x.shape[2] // keys.shape[2]
        keys, values = (part[0].repeat_interleave(groups, 1).float() for part in (keys, values))
        scores = torch.einsum("blhd,nhd->blhn", x.float(), keys) / math.sqrt(x.shape[-1])
        return torch.einsum("blhn,nhd->blhd", self.gate.float() * scores.softmax(-1), values).flatten(2)


class AdaptionPrompt(RoutedMethod[AdaptionPromptConfig, int], ChoosesLayers, CompletesConfig):
    """Adapts attention modules; its settings are the number of vectors."""

    leaves = (Leaf(PROMPT), Leaf(GATE))
    kinds = (AttentionSite,)

    def complete(self, config: AdaptionPromptConfig, catalog: Catalog) -> None:
        if config.target_modules is None:
            config.target_modules = [_name(catalog)]

    def parts(self, config: AdaptionPromptConfig, catalog: Catalog) -> list[MethodOnSites]:
        self.complete(config, catalog)
        if config.adapter_len is None or config.adapter_layers is None:
            raise ConfigError(
                f"adapter_len={config.adapter_len!r}, adapter_layers={config.adapter_layers!r}: both are needed.",
                hint="Give the number of vectors, and of the upper layers that have them.",
            )
        candidates = [attention_site(name, catalog.modules[name]) for name in catalog.targets(config)]
        sites: list[Site] = [site for site in candidates if site is not None]
        count = config.adapter_layers or 0
        if len(sites) < count:
            raise TargetError(
                f"adapter_layers={count}, and {catalog.describe()} has {len(sites)} attention modules that "
                f"target_modules={config.target_modules!r} means.",
                hint=f"Known are those of {', '.join(FORMS)}.",
            )
        return [MethodOnSites(self, sites[-count:])]

    def settings(self, config: AdaptionPromptConfig, site: Site) -> int:
        return config.adapter_len or 0

    def shapes(self, settings: int, site: Site) -> dict[str, tuple[int, ...]]:
        return {PROMPT: (1, settings, site.shape[1]), GATE: (1,)}

    def init(self, new: NewLayer[AdaptionPromptConfig, int]) -> dict[str, Tensor]:
        shapes = self.shapes(new.settings, new.site)
        return {PROMPT: new.normal(shapes[PROMPT]), GATE: torch.zeros(shapes[GATE])}

    def lower(self, settings: int, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        assert isinstance(base.site, AttentionSite)
        return Patch(route=AdaptionPromptRoute(tensors[PROMPT], tensors[GATE], base.site))


METHOD = AdaptionPrompt()


def _name(catalog: Catalog) -> str:
    """Return the usual name of a model's attention modules."""
    if catalog.model_type is None or catalog.model_type not in FORMS:
        raise TargetError(
            f"Adaption prompts need attention of a known form, and {catalog.describe()} is of type "
            f"{catalog.model_type!r}.",
            hint=f"Known are {', '.join(FORMS)}. Prefix tuning (PrefixTuningConfig) works on every decoder.",
        )
    return FORMS[catalog.model_type][1]
