"""PVeRA: probabilistic vector-based random matrix adaptation (arXiv:2512.07703, section 3).

    W' = W + diag(b) B diag(d_1) A_1        d: (2r,), b: (out,)

``A``, ``(2r, largest in)``, and ``B``, ``(largest out, r)``, are VeRA's random matrices. The halves of ``d`` and ``A``
give the mean and the logarithm of the variance of a hidden vector. Inference takes the mean; training, and inference
with ``sample_at_inference``, draws from the distribution:

    y = W x + diag(b) B (m + exp(v / 2) e)        m = diag(d_1) A_1 x, v = diag(d_2) A_2 x, e: normal
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.pvera import PveraConfig
from veneer.errors import NoMergedFormError
from veneer.methods.base.abilities import RefusesMerge
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.methods.shared.random_projection import SharesProjection, largest
from veneer.patches.patch import Patch

D = "pvera_lambda_d"
B = "pvera_lambda_b"
SHARED_A = "pvera_A"
SHARED_B = "pvera_B"


@dataclass(frozen=True)
class PveraSettings:
    """Holds a config for one layer, and the generator of its draws where the config has a seed."""

    config: PveraConfig
    generator: torch.Generator | None


@dataclass(frozen=True)
class DrawSpread:
    """Adds what one draw adds to the mean.

    Attributes:
        up: ``diag(b) B``, shape ``(out, r)``.
        down: ``diag(d_2) A_2``, shape ``(r, in)``.
        generator: of the draws, on the CPU; torch's own when ``None``.
    """

    up: Tensor
    down: Tensor
    generator: torch.Generator | None

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        deviation = (F.linear(x.to(self.down.dtype), self.down) / 2).exp()
        return F.linear(deviation * self._draw(deviation), self.up)

    def _draw(self, like: Tensor) -> Tensor:
        if self.generator is None:
            return torch.randn_like(like)
        return torch.randn(like.shape, dtype=like.dtype, generator=self.generator).to(like.device)

    def take(self, rows: Tensor, whole: torch.Size) -> DrawSpread:
        return self

    def changes(self) -> bool:
        return bool(self.up.count_nonzero())


class Pvera(Method[PveraConfig, PveraSettings], SharesProjection, RefusesMerge):
    """Adapts linear layers."""

    kinds = (LinearSite,)
    leaves = (Leaf(B), Leaf(D))
    shared = (Leaf(SHARED_A, trained=False), Leaf(SHARED_B, trained=False))

    def settings(self, config: PveraConfig, site: Site) -> PveraSettings:
        seed = config.generator_seed
        return PveraSettings(config, None if seed is None else torch.Generator().manual_seed(seed))

    def shapes(self, settings: PveraSettings, site: Site) -> dict[str, tuple[int, ...]]:
        return {B: (site.shape[0],), D: (2 * settings.config.r,)}

    def check_mergeable(self, settings: PveraSettings, site: Site) -> None:
        if settings.config.sample_at_inference:
            raise NoMergedFormError(
                "A PVeRA with sample_at_inference draws anew in every pass, so no weight can hold it.",
                hint="Set sample_at_inference to false in its config to merge the mean.",
            )

    def shared_shapes(self, config: PveraConfig, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        out, inner = largest(sites)
        return {SHARED_A: (2 * config.r, inner), SHARED_B: (out, config.r)}

    def init(self, new: NewLayer[PveraConfig, PveraSettings]) -> dict[str, Tensor]:
        if new.config.init_weights:
            return {B: torch.zeros(new.site.shape[0]), D: torch.full((2 * new.config.r,), float(new.config.d_initial))}
        return {B: torch.ones(new.site.shape[0]), D: new.normal((2 * new.config.r,))}

    def lower(self, settings: PveraSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        out, inner = base.site.shape
        config, r = settings.config, settings.config.r
        up = tensors[B].unsqueeze(1) * tensors[SHARED_B][:out]
        down = tensors[D].unsqueeze(1) * tensors[SHARED_A][:, :inner]
        mean = Patch(up=up, down=down[:r], dropout=config.pvera_dropout)
        drawn = replace(mean, route=DrawSpread(up, down[r:], settings.generator))
        return drawn if config.sample_at_inference else replace(mean, drop=lambda _: drawn)


METHOD = Pvera()
