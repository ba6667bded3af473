"""LN tuning: the norms alone are trained (Zhao et al. 2024, arXiv:2312.11420, section 3).

    W' = W + (trained W - W)      b' = b + (trained b - b)

Saved are the trained weight and bias themselves. Written as changes they add up when two adapters are active. Layers
other than norms can be trained whole in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from veneer.base_model.default_targets import own_targets
from veneer.base_model.sites.conv import ConvSite
from veneer.base_model.sites.embedding import EmbeddingSite
from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.base_model.sites.vector import NormSite, is_norm
from veneer.base_model.sites.whole_layer import WholeSite
from veneer.base_model.targets import shortest
from veneer.configs.methods.ln_tuning import LNTuningConfig
from veneer.methods.base.abilities import ChoosesLayers, CompletesConfig
from veneer.methods.base.method import BaseLayer, Leaf, Method, MethodOnSites, NewLayer
from veneer.patches.patch import Patch

if TYPE_CHECKING:
    from veneer.base_model.catalog import Catalog

WEIGHT = "ln_tuning_layers.weight"
BIAS = "ln_tuning_layers.bias"


class LNTuning(Method[LNTuningConfig, None], ChoosesLayers, CompletesConfig):
    """Adapts norms, and any other layer that a config names."""

    leaves = (Leaf(WEIGHT), Leaf(BIAS))
    kinds = (NormSite, LinearSite, ConvSite, EmbeddingSite, WholeSite)

    def complete(self, config: LNTuningConfig, catalog: Catalog) -> None:
        if config.target_modules is None:
            config.target_modules = own_targets(str(config.peft_type), catalog.model_type)
        if config.target_modules is None:
            norms = [name for name, module in catalog.modules.items() if is_norm(module)]
            config.target_modules = shortest(norms, catalog.modules)

    def parts(self, config: LNTuningConfig, catalog: Catalog) -> list[MethodOnSites]:
        return [MethodOnSites(self, catalog.sites(config, whole=True))]

    def settings(self, config: LNTuningConfig, site: Site) -> None:
        return None

    def shapes(self, settings: None, site: Site) -> dict[str, tuple[int, ...]]:
        shapes = {WEIGHT: site.stored_shape}
        return shapes if site.bias is None else {**shapes, BIAS: tuple(site.bias.shape)}

    def init(self, new: NewLayer[LNTuningConfig, None]) -> dict[str, Tensor]:
        tensors = {WEIGHT: new.site.as_stored(new.base.base_weight()).float().clone()}
        return tensors if new.base.base_bias is None else {**tensors, BIAS: new.base.base_bias.detach().float().clone()}

    def lower(self, settings: None, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        dense = base.site.canonical(tensors[WEIGHT].float()) - base.base_weight().float()
        if BIAS not in tensors:
            return Patch(dense=dense)
        assert base.base_bias is not None
        return Patch(dense=dense, shift=tensors[BIAS].float() - base.base_bias.detach().float())


METHOD = LNTuning()
