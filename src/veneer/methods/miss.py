"""MiSS: matrix shard sharing (Kang & Yin 2024, arXiv:2409.15371, section 3), once called Bone.

    W' = W + B^T [1 1 ... 1]      B: (r, out), or (r, mini_r) repeated along the outputs; [1 1 ...]: (r, in)
    W'_pq = W_pq + W_pq B_p + B_p     "bat": W cut into (r, r) blocks, B: (out / r, r, r)

The first adds the inputs up in steps of r before B sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.bone import BoneConfig
from veneer.configs.methods.miss import MissConfig
from veneer.errors import UnsupportedError
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.patches.patch import Patch


@dataclass(frozen=True)
class MissSettings:
    """Holds a config's values for one layer; ``columns`` is the number of outputs that B has before it is repeated."""

    r: int
    columns: int
    bat: bool
    dropout: float


class Miss(Method[MissConfig | BoneConfig, MissSettings]):
    """Adapts linear layers.

    Args:
        name: the matrix's name in a checkpoint.
    """

    kinds = (LinearSite,)

    def __init__(self, name: str) -> None:
        self.name = name
        self.leaves = (Leaf(name),)

    def settings(self, config: MissConfig | BoneConfig, site: Site) -> MissSettings:
        (out, inner), r, bat = site.shape, config.r, config.init_weights == "bat"
        mini = isinstance(config, MissConfig) and config.init_weights == "mini"
        columns = config.mini_r if isinstance(config, MissConfig) and mini else out
        if r > inner:
            raise UnsupportedError(
                f"{site.name}: `r` ({r}) must be less than or equal to in_features ({inner}).",
                hint=f"r={r}: choose a lower one, or leave the layer out with exclude_modules.",
            )
        if out % columns or (bat and (out % r or inner % r)):
            raise UnsupportedError(
                f"{site.name} has {inner} inputs and {out} outputs, which do not fit r={r}"
                + (f" and mini_r={columns}." if mini else "."),
                hint='mini_r divides the outputs; with "bat" r divides both.',
            )
        return MissSettings(r, columns, bat, 0.0 if bat else getattr(config, "miss_dropout", 0.0))

    def shapes(self, settings: MissSettings, site: Site) -> dict[str, tuple[int, ...]]:
        r = settings.r
        return {self.name: (site.shape[0] // r, r, r) if settings.bat else (r, settings.columns)}

    def init(self, new: NewLayer[MissConfig | BoneConfig, MissSettings]) -> dict[str, Tensor]:
        return new.kaiming(self.shapes(new.settings, new.site), {self.name} if new.config.init_weights else ())

    def lower(self, settings: MissSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        (out, inner), r, block = base.site.shape, settings.r, tensors[self.name]
        if settings.bat:
            weight = base.base_weight().to(block.dtype).view(out // r, r, inner // r, r)
            change = torch.einsum("paqb,pbc->paqc", weight, block) + block.unsqueeze(2)
            return Patch(dense=change.reshape(out, inner))
        ones = torch.eye(r, dtype=block.dtype, device=block.device).repeat(1, -(-inner // r))[:, :inner]
        return Patch(up=block.repeat(1, out // settings.columns).mT, down=ones, dropout=settings.dropout)


METHOD = Miss("miss_block")
