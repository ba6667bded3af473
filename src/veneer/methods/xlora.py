"""X-LoRA: a classifier weighs LoRA adapters at each token (Buehler and Buehler 2024, arXiv:2402.07148, section 2).

    y' = y + g sum_i s_i scale_i B_i A_i x        s = softmax(classifier(h) / temperature)

``h``, (rows, length, hidden), are the base's last hidden states, from a first pass of the model over the same tokens.
The classifier has ``xlora_depth`` linear layers; what it says is for all layers, or for each its own. The LoRAs, frozen
unless ``use_trainable_adapters``, are adapters of their own on the model. The first pass keeps keys and values of its
own in the cache, so generation works with it; peft computes every token anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.base_model.sites.embedding import EmbeddingSite
from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.xlora import XLoraConfig
from veneer.errors import AdapterError, ConfigError, UnsupportedError
from veneer.methods.base.abilities import ChoosesLayers, CompletesConfig, SharesTensors
from veneer.methods.base.method import BaseLayer, Leaf, MethodOnSites, NewLayer
from veneer.methods.base.routed_method import RoutedMethod
from veneer.methods.shared.expert_mixture import LiveLayer, low_rank_patches, weighted_sum
from veneer.patches.forward_call import current
from veneer.patches.patch import Patch

if TYPE_CHECKING:
    from veneer.base_model.catalog import Catalog


CLASSIFIER = "internal_xlora_classifier"


@dataclass(frozen=True)
class XLoraSettings:
    """Holds a config, and a layer's place among those that are adapted."""

    config: XLoraConfig
    layer: int


@dataclass(frozen=True)
class XLoraRoute:
    """Adds to one layer's output what its LoRAs add, weighed at each token.

    Attributes:
        site: the layer.
        place: its place among the adapted layers.
        experts: the LoRAs that are on it.
        columns: their places among all LoRAs.
        rows: the rows of the batch that the layer is given; all when ``None``.
    """

    site: Site
    place: XLoraSettings
    experts: Sequence[Patch]
    columns: list[int]
    rows: Tensor | None = None

    def changes(self) -> bool:
        return self.place.config.global_scaling_weight != 0 and any(patch.changes() for patch in self.experts)

    def take(self, rows: Tensor, whole: torch.Size) -> XLoraRoute:
        return replace(self, rows=rows)

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        config = self.place.config
        scalings = current_weights(config)[:, :, self.place.layer]
        if self.rows is not None:
            scalings = scalings[self.rows]
        if x.shape[:2] != scalings.shape[:2]:
            raise AdapterError(
                f"{self.site.name} was given {tuple(x.shape[:2])} inputs; X-LoRA weighs {tuple(scalings.shape[:2])}.",
                hint="X-LoRA fits layers that see every token once, and works without a prompt beside it.",
            )
        weights = _chosen(config, scalings)[..., self.columns] * config.global_scaling_weight
        return weighted_sum(self.site, self.experts, weights, x, training)


def _chosen(config: XLoraConfig, scalings: Tensor) -> Tensor:
    """Return the weights of all LoRAs, ``(rows, length, experts)``, zero for those that a token does not use."""
    if config.top_k_lora is not None:
        best = scalings.topk(min(config.top_k_lora, scalings.shape[-1]), -1).indices
        scalings = scalings * torch.zeros_like(scalings).scatter(-1, best, 1.0)
    if not config.enable_softmax_topk:
        return scalings
    used = scalings != 0
    return scalings.masked_fill(~used, -math.inf).softmax(-1).masked_fill(~used, 0.0)


class XLora(RoutedMethod[XLoraConfig, XLoraSettings], SharesTensors, ChoosesLayers, CompletesConfig):
    """Mixes LoRAs on linear layers and embeddings."""

    leaves = ()
    kinds = (LinearSite, EmbeddingSite)
    shared = (Leaf(CLASSIFIER),)

    def complete(self, config: XLoraConfig, catalog: Catalog) -> None:
        if not config.adapters:
            raise ConfigError("adapters is empty.", hint='Name the LoRA adapters: adapters={"0": path, "1": path}.')
        model_config = getattr(catalog.model, "config", None)
        if model_config is None or getattr(model_config, "is_encoder_decoder", False):
            raise UnsupportedError(
                f"X-LoRA reads a model's last hidden states, and {catalog.describe()} has no single stack of them.",
                hint="Use it on a decoder or an encoder of transformers.",
            )
        if config.hidden_size is None:
            config.hidden_size = int(model_config.get_text_config().hidden_size)

    def parts(self, config: XLoraConfig, catalog: Catalog) -> list[MethodOnSites]:
        self.complete(config, catalog)
        return [MethodOnSites(self, catalog.sites(config))]

    def settings(self, config: XLoraConfig, site: Site) -> XLoraSettings:
        return XLoraSettings(config, list(config.target_modules or ()).index(site.name))

    def shapes(self, settings: XLoraSettings, site: Site) -> dict[str, tuple[int, ...]]:
        return {}

    def shared_shapes(self, config: XLoraConfig, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        last = len(config.experts) * (len(config.target_modules or ()) if config.layerwise_scalings else 1)
        widths = [config.hidden_size or 0, *[config.xlora_size] * (config.xlora_depth - 1), last]
        shapes: dict[str, tuple[int, ...]] = {}
        for name, inner, out in zip(linears(config), widths, widths[1:], strict=False):
            shapes |= {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}
        return shapes

    def make_shared(
        self, config: XLoraConfig, bases: Sequence[BaseLayer], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        shapes = self.shared_shapes(config, [base.site for base in bases])
        bounds = {leaf: 1 / math.sqrt(shapes[f"{leaf.rpartition('.')[0]}.weight"][1]) for leaf in shapes}
        return {
            leaf: torch.empty(shape).uniform_(-bounds[leaf], bounds[leaf], generator=generator)
            for leaf, shape in shapes.items()
        }

    def init(self, new: NewLayer[XLoraConfig, XLoraSettings]) -> dict[str, Tensor]:
        return {}

    def lower(self, settings: XLoraSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        # A layer on disk does not come here: merging is refused before.
        layer, experts = cast(LiveLayer, base), settings.config.experts
        here = layer.here(experts)
        return Patch(
            route=XLoraRoute(base.site, settings, low_rank_patches(layer, here), [experts.index(name) for name in here])
        )


METHOD = XLora()


def linears(config: XLoraConfig) -> list[str]:
    """Return the names on disk of the classifier's linear layers: activations, and dropout if any, lie between."""
    step = 3 if config.xlora_dropout_p > 0 else 2
    return [f"{CLASSIFIER}.layers.{step * place}" for place in range(config.xlora_depth)]


def predict(config: XLoraConfig, tensors: Mapping[str, Tensor], hidden: Tensor, training: bool) -> Tensor:
    """Return the weight of each LoRA at each token, ``(rows, length, layers, experts)``.

    Args:
        config: of the adapter.
        tensors: the classifier's.
        hidden: the base's last hidden states, ``(rows, length, hidden)``.
        training: whether dropout is on.
    """
    *first, last = linears(config)
    hidden = hidden.to(tensors[f"{last}.weight"].dtype)
    for name in first:
        hidden = F.linear(hidden, tensors[f"{name}.weight"], tensors[f"{name}.bias"]).relu()
        hidden = F.dropout(hidden, config.xlora_dropout_p, training)
    logits = F.linear(hidden, tensors[f"{last}.weight"], tensors[f"{last}.bias"]).unflatten(
        -1, (-1, len(config.experts))
    )
    scalings = logits.expand(-1, -1, len(config.target_modules or ()), -1)
    weights: Tensor = (scalings / config.softmax_temperature).softmax(-1) if config.enable_softmax else scalings
    return weights


def current_weights(config: XLoraConfig) -> Tensor:
    """Return the weights that hold in the pass that is under way, ``(rows, length, layers, experts)``."""
    weights = (current().xlora_weights or {}).get(id(config))
    if weights is None:
        raise AdapterError(
            "An X-LoRA adapter is active, and nothing was worked out for this call.",
            hint="Call the model as a whole, and train it without gradient checkpointing.",
        )
    return weights
