"""Super-Tuning: the weight's largest entries are trained (arXiv:2607.09287), and Supra: a LoRA beside them.

    W' = W + scatter(values at indices) + lora_alpha / r * B A        values: (n,), indices: (n,)

An index counts the entries of ``W``, ``(out, in)``, row by row; ``n`` is the share that ``sparsity`` leaves. Dropout
acts on the input of the whole change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.supertuning import SupertuningConfig
from veneer.errors import UnsupportedError
from veneer.methods.base.abilities import DerivesTensors
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.patches.operators import Sparse
from veneer.patches.patch import Patch

VALUES = "supertuning_values"
INDICES = "supertuning_indices"
A, B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


class Supertuning(Method[SupertuningConfig, SupertuningConfig], DerivesTensors):
    """Adapts linear layers, by Supra too."""

    kinds = (LinearSite,)
    leaves = (Leaf(VALUES), Leaf(INDICES, trained=False, integer=True), Leaf(A), Leaf(B))

    def settings(self, config: SupertuningConfig, site: Site) -> SupertuningConfig:
        if not _count(config, site):
            raise UnsupportedError(
                f"{site.name}: sparsity={config.sparsity} leaves no trainable entries in a weight of {site.shape}.",
                hint="Lower it, or leave the layer out with exclude_modules.",
            )
        return config

    def shapes(self, settings: SupertuningConfig, site: Site) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {VALUES: (_count(settings, site),)}
        if settings.save_precomputed_indices:
            shapes[INDICES] = shapes[VALUES]
        if settings.r is not None:
            shapes.update({A: (settings.r, site.shape[1]), B: (site.shape[0], settings.r)})
        return shapes

    def init(self, new: NewLayer[SupertuningConfig, SupertuningConfig]) -> dict[str, Tensor]:
        shapes = self.shapes(new.settings, new.site)
        tensors = {leaf: torch.zeros(shape) for leaf, shape in shapes.items() if leaf != INDICES}
        for leaf, tensor in tensors.items():
            if leaf == A:
                torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=new.generator)
            elif not new.config.init_weights:
                tensor.normal_(generator=new.generator)
        return tensors

    def extra_tensors(
        self, config: SupertuningConfig, bases: Sequence[BaseLayer], shared: Mapping[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        return [{INDICES: _chosen(config, base)} for base in bases]

    def lower(self, settings: SupertuningConfig, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        places, columns = tensors[INDICES].int(), base.site.shape[1]
        dense = Sparse(tensors[VALUES], places // columns, places % columns, base.site.shape)
        if settings.r is None or settings.lora_alpha is None:
            return Patch(dense=dense)
        scale = settings.lora_alpha / settings.r
        return Patch(up=tensors[B], down=tensors[A], scale=scale, dropout=settings.lora_dropout, dense=dense)


METHOD = Supertuning()


def _count(config: SupertuningConfig, site: Site) -> int:
    return int(math.prod(site.shape) * (1 - config.sparsity))


def _chosen(config: SupertuningConfig, base: BaseLayer) -> Tensor:
    sizes = base.base_weight().abs().flatten()
    return sizes.topk(_count(config, base.site), largest=config.select_top).indices.int()
