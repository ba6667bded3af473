"""Lily: low-rank interconnected adaptation across layers (Zhong et al. 2024, arXiv:2407.09946, section 3).

    y' = y + scaling * (x A) sum_e p_e B_e        p = mean over all tokens of softmax(x A R)

    A: (r, in), shared by neighbouring layers; B: (experts * r, out), shared by all layers of a target; R: (experts, r)

The mean goes over every token of the call, padding included, so that a row's result depends on the rows beside it: so
it is in peft, and so checkpoints are trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.base_model.sites.site import Site
from veneer.configs.methods.lily import LilyConfig
from veneer.methods.base.abilities import SharesBetweenLayers
from veneer.methods.base.method import BaseLayer, Leaf, NewLayer
from veneer.methods.base.routed_method import RoutedMethod
from veneer.patches.patch import Patch
from veneer.patches.route import CacheableRoute

A = "lily_A.weight"
B = "lily_B.weight"
ROUTER = "lily_router.weight"


@dataclass(frozen=True)
class LilyRoute(CacheableRoute):
    """Adds to one layer's output by the mean of its experts."""

    a: Tensor
    b: Tensor
    router: Tensor
    scaling: float

    def changes(self) -> bool:
        return self.scaling != 0 and bool(self.a.count_nonzero()) and bool(self.b.count_nonzero())

    def take(self, rows: Tensor, whole: torch.Size) -> LilyRoute:
        return self

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        hidden = F.linear(x.to(self.a.dtype), self.a)
        shares = F.linear(hidden, self.router).softmax(-1).flatten(0, -2).mean(0)
        mixed = torch.einsum("e,ero->ro", shares, self.b.unflatten(0, (len(self.router), -1)))
        return hidden @ mixed * self.scaling

    def for_inference(self, dtype: torch.dtype) -> LilyInferenceRoute:
        a = self.a.float()
        down = torch.cat([a, self.router.float() @ a]).T
        return LilyInferenceRoute(
            down.to(dtype).contiguous(), (self.b.float() * self.scaling).to(dtype), len(self.router)
        )


@dataclass(frozen=True)
class LilyInferenceRoute:
    """Adds the same in fewer calls, for inference.

    Attributes:
        down: ``A`` and ``A R`` side by side, shape ``(in, r + experts)``.
        up: ``scaling * B``, shape ``(experts * r, out)``.
        experts: their number.
    """

    down: Tensor
    up: Tensor
    experts: int

    def changes(self) -> bool:
        return bool(self.down.count_nonzero()) and bool(self.up.count_nonzero())

    def take(self, rows: Tensor, whole: torch.Size) -> LilyInferenceRoute:
        return self

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        joined = torch.mm(x.reshape(-1, x.shape[-1]).to(self.down.dtype), self.down)
        rank = joined.shape[1] - self.experts
        hidden, shares = joined[:, :rank], joined[:, rank:].softmax(-1)
        if len(joined) == 1:  # one token: its experts' products are cheaper than their mean matrix
            y = torch.mm((shares.T * hidden).view(1, -1), self.up)
        else:
            mixed = torch.mv(self.up.view(self.experts, -1).T, shares.mean(0))
            y = torch.mm(hidden, mixed.view(rank, -1))
        return y.view(*x.shape[:-1], -1)


class Lily(RoutedMethod[LilyConfig, LilyConfig], SharesBetweenLayers):
    """Adapts linear layers, of which several share a factor."""

    leaves = (Leaf(A), Leaf(B), Leaf(ROUTER))

    def settings(self, config: LilyConfig, site: Site) -> LilyConfig:
        return config

    def shapes(self, settings: LilyConfig, site: Site) -> dict[str, tuple[int, ...]]:
        out, inner = site.shape
        r, experts = settings.r, settings.num_B
        return {A: (r, inner), B: (experts * r, out), ROUTER: (experts, r)}

    def init(self, new: NewLayer[LilyConfig, LilyConfig]) -> dict[str, Tensor]:
        tensors = {}
        for leaf, shape in self.shapes(new.settings, new.site).items():
            bound = 0.0 if leaf == B and new.config.init_weights else 1 / math.sqrt(shape[1])
            tensors[leaf] = new.uniform(shape, bound)
        return tensors

    def shared_between_layers(self, config: LilyConfig, sites: Sequence[Site]) -> dict[str, list[int]]:
        groups: dict[tuple[str, tuple[int, int]], list[int]] = {}
        leaders: dict[str, list[int]] = {A: [], B: []}
        for index, site in enumerate(sites):
            group = groups.setdefault((_target(config, site.name), site.shape), [])
            group.append(index)
            leaders[A].append(group[(len(group) - 1) // config.stride_A * config.stride_A])
            leaders[B].append(group[0])
        return leaders

    def lower(self, settings: LilyConfig, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        return Patch(route=LilyRoute(tensors[A], tensors[B], tensors[ROUTER], settings.scaling))


METHOD = Lily()


def _target(config: LilyConfig, name: str) -> str:
    """Return the longest of the config's targets that a layer's name ends with; an expression is one target."""
    targets = config.target_modules
    if isinstance(targets, str):
        return targets
    return max((target for target in targets or () if name.endswith(target)), key=len, default="")
