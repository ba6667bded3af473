"""PEANuT: a change computed from the weight (Zhong et al. 2024, arXiv:2410.01870, section 3).

    W' = W + scaling * B h^T        h = net(f(W^T A^T))        A: (r, out), B: (out, r), h: (in, r)

``net`` is ``depth`` encoders and as many decoders, ``(r, r)`` each, with the activation ``f`` after each and a residual
from each encoder's input to its decoder's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from transformers.activations import ACT2FN

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.peanut import PeanutConfig
from veneer.errors import ConfigError
from veneer.methods.base.abilities import VariesWithConfig
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.patches.patch import Patch

A, B = "peanut_A.weight", "peanut_B.weight"


class Peanut(Method[PeanutConfig, PeanutConfig], VariesWithConfig):
    """Adapts linear layers.

    Args:
        depth: the number of encoders, and of decoders.
    """

    kinds = (LinearSite,)

    def __init__(self, depth: int) -> None:
        self.encoders = [f"peanut_encoders.{index}.weight" for index in range(depth)]
        self.decoders = [f"peanut_decoders.{index}.weight" for index in range(depth)]
        self.leaves = tuple(map(Leaf, (A, B, *self.encoders, *self.decoders)))

    def specialised(self, config: PeanutConfig) -> Peanut:
        return Peanut(config.depth)

    def settings(self, config: PeanutConfig, site: Site) -> PeanutConfig:
        if config.act_fn not in ACT2FN:
            raise ConfigError(f"act_fn={config.act_fn!r} is unknown.", hint=f"Known: {', '.join(sorted(ACT2FN))}.")
        return config

    def shapes(self, settings: PeanutConfig, site: Site) -> dict[str, tuple[int, ...]]:
        out, r = site.shape[0], settings.r
        return {A: (r, out), B: (out, r), **dict.fromkeys((*self.encoders, *self.decoders), (r, r))}

    def init(self, new: NewLayer[PeanutConfig, PeanutConfig]) -> dict[str, Tensor]:
        return new.kaiming(self.shapes(new.settings, new.site), {B} if new.config.init_weights else ())

    def lower(self, settings: PeanutConfig, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        activate: Callable[[Tensor], Tensor] = ACT2FN[settings.act_fn]
        wide = {leaf: tensor.float() for leaf, tensor in tensors.items()}
        hidden = activate((wide[A] @ base.base_weight().float()).T)
        passed = []
        for leaf in self.encoders:
            passed.append(hidden)
            hidden = activate(hidden @ wide[leaf].T)
        for leaf in self.decoders:
            hidden = activate(hidden @ wide[leaf].T) + passed.pop()
        return Patch(up=wide[B], down=hidden.T, scale=settings.scaling)


METHOD = Peanut(0)
