"""The weight of an embedding or output layer, and its bias, saved beside its LoRA (``save_embedding_layers``).

It is the base's own weight in most checkpoints, and another where the vocabulary was extended before training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.base_model.sites.site import Site
from veneer.configs.base import TargetedConfig
from veneer.methods.base.abilities import AdaptsTwins, SettledByCheckpoint
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.methods.base.trained_bias import ADAPTED_BIAS, Bias
from veneer.patches.patch import Patch, Tokens

WEIGHT = "base_layer.weight"


@dataclass(frozen=True)
class SavedWeightSettings:
    """Tells whether a token is a row of the canonical weight, and whether the base's own weight differs."""

    rows: bool
    differs: bool = True


class SavedWeight(Method[TargetedConfig, SavedWeightSettings], AdaptsTwins, SettledByCheckpoint):
    """Puts a whole weight, shape ``(vocabulary, dim)``, in the place of the base's."""

    leaves = (Leaf(WEIGHT, trained=False, memory_name="saved_weight"),)
    twins_repeat = False

    def settings(self, config: TargetedConfig, site: Site) -> SavedWeightSettings:
        return SavedWeightSettings(rows=not site.looks_up)

    def settings_from_tensors(
        self, settings: SavedWeightSettings, tensors: Mapping[str, Tensor], base: BaseLayer
    ) -> SavedWeightSettings:
        saved, stored = tensors[self.leaves[0].name], base.base_weight()
        stored = stored if settings.rows else stored.T
        # The base's own weight may have been saved in a narrower dtype than the base is loaded in.
        alike = torch.equal(saved.to(stored.dtype), stored) or torch.equal(saved, stored.to(saved.dtype))
        return replace(settings, differs=not alike)

    def twin_settings(self, settings: SavedWeightSettings, twin: Site) -> SavedWeightSettings | None:
        return replace(settings, rows=not twin.looks_up) if settings.differs else None

    def shapes(self, settings: SavedWeightSettings, site: Site) -> dict[str, tuple[int, ...]]:
        out, inner = site.shape
        return {self.leaves[0].name: (out, inner) if settings.rows else (inner, out)}

    def init(self, new: NewLayer[TargetedConfig, SavedWeightSettings]) -> dict[str, Tensor]:
        weight = new.base.base_weight()
        return {self.leaves[0].name: (weight if new.settings.rows else weight.T).float()}

    def lower(self, settings: SavedWeightSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        if not settings.differs:
            return Patch()
        values = tensors[self.leaves[0].name]
        return Patch(tokens=Tokens(torch.arange(values.shape[0], device=values.device), values, settings.rows))


class TokenBase(SavedWeight):
    """Puts a whole weight in the place of the base's where some of its tokens are trained beside a LoRA."""

    leaves = (Leaf(f"token_adapter.{WEIGHT}", trained=False, memory_name="saved_token_weight"),)


class SavedBias(Bias):
    """Puts the bias of such a layer in the place of the base's; it is not trained."""


SAVED_WEIGHT = SavedWeight()
TOKEN_BASE = TokenBase()
SAVED_BIAS = SavedBias(Leaf(ADAPTED_BIAS.name, trained=False, memory_name="saved_bias"))
