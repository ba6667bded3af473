"""MonteCLoRA: LoRA trained under noise of a learned size (Sengupta et al. 2024, arXiv:2411.04358, section 3).

    training: A' = A + eps * sum_n w_n Z_n        otherwise, and merged, a plain LoRA

Row i of a draw ``Z_n`` is normal with the variance ``v_i``, the diagonal of a Wishart draw around ``exp(2 s_i)``; the
weights ``w`` are a softmax of a normal that stands for a Dirichlet of ``exp(a)``. ``s``, (r,), and ``a``, (n,), are
trained. ``sum_n w_n Z_n`` has the law of one normal draw times ``||w||``, which is what is drawn here. The loss gets
the mean over layers of how far the distributions are from their priors, and of ``||w||^2`` with ``use_entropy``. The
last ``v`` and ``w`` are saved, as peft saves them; nothing is computed from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

from veneer.base_model.sites.site import Site
from veneer.configs.lora_variant_options import MontecloraConfig
from veneer.methods.base.method import Leaf
from veneer.methods.lora_variants.variant import Variant
from veneer.patches.patch import Patch

if TYPE_CHECKING:
    from veneer.methods.base.method import BaseLayer


_HEAD = "lora_monteclora_sampler"
SPREAD, SHARES = f"{_HEAD}.std_prior", f"{_HEAD}.expert_weights_prior"
LAST_VARIANCES, LAST_WEIGHTS = f"{_HEAD}.gaussian_var_prior", f"{_HEAD}.expert_weights"
# The least variance.
FLOOR = 1e-3


@dataclass(frozen=True)
class MonteClora(Variant):
    """Adds noise of a learned size to A in training."""

    r: int
    options: MontecloraConfig
    leaves = (
        Leaf(SPREAD),
        Leaf(SHARES),
        Leaf(LAST_VARIANCES, trained=False),
        Leaf(LAST_WEIGHTS, trained=False),
    )

    def shapes(self, plain: Mapping[str, tuple[int, ...]], site: Site) -> dict[str, tuple[int, ...]]:
        count = (self.options.num_samples,)
        return {**plain, SPREAD: (self.r,), SHARES: count, LAST_VARIANCES: (self.r, self.r), LAST_WEIGHTS: count}

    def init(self, base: BaseLayer, generator: torch.Generator | None) -> dict[str, Tensor]:
        count = self.options.num_samples
        return {
            SPREAD: torch.rand(self.r, generator=generator),
            SHARES: torch.rand(count, generator=generator),
            LAST_VARIANCES: torch.eye(self.r),
            LAST_WEIGHTS: torch.full((count,), 1 / count),
        }

    def patch(self, plain: Patch, tensors: Mapping[str, Tensor]) -> Patch:
        return replace(plain, drop=lambda patch: self._noisy(patch, tensors))

    def _noisy(self, patch: Patch, tensors: Mapping[str, Tensor]) -> Patch:
        assert patch.down is not None
        variances, weights = self._variances(tensors[SPREAD].float()), self._weights(tensors[SHARES].float())
        with torch.no_grad():
            tensors[LAST_VARIANCES].copy_(variances.diag())
            tensors[LAST_WEIGHTS].copy_(weights)
        size = self.options.sample_scaler * weights.norm() * variances.sqrt()
        noise = size.unsqueeze(1) * torch.randn_like(patch.down, dtype=torch.float32)
        return replace(patch, down=patch.down + noise.to(patch.down.dtype))

    def _variances(self, spread: Tensor) -> Tensor:
        """Return the diagonal, ``(r,)``, of a Wishart draw of r degrees of freedom: independent chi-squares."""
        chi = torch.randn(self.r, self.r, device=spread.device).square().sum(1)
        return ((2 * spread).exp() * chi).clamp_min(FLOOR)

    def _weights(self, shares: Tensor) -> Tensor:
        """Return the weights of the draws, ``(n,)``: a Dirichlet in Laplace's approximation on the softmax's scale."""
        inverse, count = (-shares).exp(), self.options.num_samples
        variance = inverse * (1 - 2 / count) + inverse.sum() / count**2
        return (shares - shares.mean() + variance.clamp_min(1e-6).sqrt() * torch.randn_like(shares)).softmax(0)

    def penalty(self, layers: Sequence[Mapping[str, Tensor]]) -> Tensor:
        terms = [self._far(tensors[SPREAD].float(), tensors[SHARES].float()) for tensors in layers]
        return torch.stack([term.to(terms[0].device) for term in terms]).mean()

    def _far(self, spread: Tensor, shares: Tensor) -> Tensor:
        prior = torch.full_like(shares, self.options.dirichlet_prior)
        even = kl_divergence(Dirichlet(shares.exp()), Dirichlet(prior))
        scale = self.r * _far_from_one((2 * spread).exp()) / 2
        drawn = self.options.num_samples * _far_from_one(self._variances(spread)) / 2
        far = self.options.kl_loss_weight * (even + scale + drawn)
        return far + self._weights(shares).square().sum() if self.options.use_entropy else far


def _far_from_one(variances: Tensor) -> Tensor:
    """Return twice the divergence of a normal with such variances from the standard one."""
    return (variances - variances.log() - 1).sum()
