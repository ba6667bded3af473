"""The quantised weight that a LoftQ adapter was begun on, in the place of the base's own: ``W' = W + (Q - W)``.

It is worked out from the base (``lora_starts/loftq.py``) and in no checkpoint. A base that is packed is taken to be
``Q`` already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from veneer.base_model.sites.site import Site
from veneer.base_model.targets import pattern_value
from veneer.configs.methods.lora import LoraConfig
from veneer.methods.base.abilities import ChangesWhenSaved, Exclusive
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.methods.lora_starts.loftq import quantised
from veneer.patches.patch import Patch

CHANGE = "lora_loftq_change"


class LoftqBase(Method[LoraConfig, int], ChangesWhenSaved, Exclusive):
    """Adds ``Q - W``, shape ``(out, in)``, beside a LoRA; its settings are the LoRA's rank."""

    leaves = (Leaf(CHANGE, trained=False, saved=False),)

    def settings(self, config: LoraConfig, site: Site) -> int:
        r: int = pattern_value(site.pattern_name, config.rank_pattern, config.r)
        return r

    def shapes(self, settings: int, site: Site) -> dict[str, tuple[int, ...]]:
        return {}

    def init(self, new: NewLayer[LoraConfig, int]) -> dict[str, Tensor]:
        return self.recomputed(new.config, new.settings, lambda: new.base)

    def recomputed(self, config: LoraConfig, settings: int, base: Callable[[], BaseLayer]) -> dict[str, Tensor]:
        weight = base().base_weight().float()
        return {CHANGE: quantised(weight, settings, config.loftq_config or {}) - weight}

    def lower(self, settings: int, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        return Patch(dense=tensors[CHANGE])


LOFTQ_BASE = LoftqBase()
