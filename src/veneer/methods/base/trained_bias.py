"""Biases that are trained whole beside an adapter (``bias="lora_only"`` and ``"all"``): ``b' = b + (trained - b)``.

In peft they are shared by all adapters, which overwrite each other's; here each adapter brings its own. Those of the
first that is trained take the places of the base's (``layers/bias_in_place.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from veneer.base_model.sites.site import Site
from veneer.configs.base import TargetedConfig
from veneer.methods.base.abilities import AdaptsTwins
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.patches.patch import Patch


class Bias(Method[TargetedConfig, None], AdaptsTwins):
    """Puts a trained bias in the place of a layer's own.

    Other modules may hold the same bias. The layer computes with it, so they are left as they are.

    Args:
        leaf: the one tensor.
    """

    def __init__(self, leaf: Leaf) -> None:
        self.name = leaf.name
        self.leaves = (leaf,)

    def settings(self, config: TargetedConfig, site: Site) -> None:
        return None

    def twin_settings(self, settings: None, twin: Site) -> None:
        return None

    def shapes(self, settings: None, site: Site) -> dict[str, tuple[int, ...]]:
        has_bias = site.is_bias or site.bias is not None
        return {self.name: site.shape[:1]} if has_bias else {}

    def init(self, new: NewLayer[TargetedConfig, None]) -> dict[str, Tensor]:
        return {self.name: base_bias(new.base).float().clone()}

    def lower(self, settings: None, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        shift = tensors[self.name].float() - base_bias(base).float()
        return Patch(dense=shift.unsqueeze(1)) if base.site.is_bias else Patch(shift=shift)


def base_bias(base: BaseLayer) -> Tensor:
    """Return the bias of the base that a trained one takes the place of."""
    if base.site.is_bias:
        return base.base_weight().squeeze(1)
    assert base.base_bias is not None
    return base.base_bias.detach()


TRAINED_BIAS = "trained_bias"
# The bias of a layer that the adapter changes otherwise too, and of any other layer.
ADAPTED_BIAS = Bias(Leaf("base_layer.bias", memory_name=TRAINED_BIAS))
OTHER_BIAS = Bias(Leaf("bias", memory_name=TRAINED_BIAS))
