"""PSOFT: orthogonal fine-tuning in the principal subspace (ICLR 2026, section 4).

    W' = W + scale * B (diag(b) Q diag(a) - 1) A        Q = (1 + K) (1 - K)^-1        K: (r, r), skew

``scale B A`` is the first ``r`` singular directions of ``W``, so that ``W'`` is ``W`` with these turned and scaled.
They are in no checkpoint: they are worked out again from the base, and an adapter means what it meant only on the very
same weights, decomposed with the same signs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.psoft import PsoftConfig
from veneer.errors import UnsupportedError
from veneer.methods.base.abilities import DerivesTensors
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.methods.shared.rotation import cayley, neumann, skew_of
from veneer.patches.low_rank import balanced
from veneer.patches.patch import Patch

TURN = "psoft_R.weight"
AFTER = "psoft_R.vector_b"
BEFORE = "psoft_R.vector_a"
A, B = "psoft_A", "psoft_B"


class Psoft(Method[PsoftConfig, PsoftConfig], DerivesTensors):
    """Adapts linear layers."""

    kinds = (LinearSite,)
    leaves = (Leaf(TURN), Leaf(AFTER), Leaf(BEFORE))

    def settings(self, config: PsoftConfig, site: Site) -> PsoftConfig:
        if config.r > min(site.shape):
            out, inner = site.shape
            raise UnsupportedError(
                f"{site.name}: `r` ({config.r}) must be less than or equal to min(in_features, out_features) "
                f"({inner}, {out}).",
                hint="Choose a lower r, or leave the layer out with exclude_modules.",
            )
        return config

    def shapes(self, settings: PsoftConfig, site: Site) -> dict[str, tuple[int, ...]]:
        r = settings.r
        shapes: dict[str, tuple[int, ...]] = {TURN: (r * (r - 1) // 2,) if settings.psoft_orth else (r, r)}
        scales = {AFTER: settings.psoft_mag_b, BEFORE: settings.psoft_mag_a}
        return {**shapes, **{leaf: (r,) for leaf, used in scales.items() if used}}

    def init(self, new: NewLayer[PsoftConfig, PsoftConfig]) -> dict[str, Tensor]:
        tensors = {leaf: torch.ones(shape) for leaf, shape in self.shapes(new.settings, new.site).items()}
        tensors[TURN] = torch.zeros_like(tensors[TURN]) if new.config.psoft_orth else torch.eye(new.config.r)
        if not new.config.init_weights:
            tensors[TURN] += 0.1 * new.normal(tensors[TURN].shape)
        return tensors

    def extra_tensors(
        self, config: PsoftConfig, bases: Sequence[BaseLayer], shared: Mapping[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        return [_directions(config, base.base_weight().float()) for base in bases]

    def lower(self, settings: PsoftConfig, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        r, values = settings.r, tensors[TURN].float()
        turn = _orthogonal(settings, skew_of(values[None], r)[0]) if settings.psoft_orth else values
        if AFTER in tensors:
            turn = tensors[AFTER].float().unsqueeze(1) * turn
        if BEFORE in tensors:
            turn = turn * tensors[BEFORE].float()
        up = tensors[B].float() @ (turn - torch.eye(r, device=turn.device))
        return Patch(up=up, down=tensors[A], scale=settings.psoft_alpha / r, dropout=settings.psoft_dropout)


METHOD = Psoft()


def _directions(config: PsoftConfig, weight: Tensor) -> dict[str, Tensor]:
    if config.psoft_svd == "full":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[] if weight.device.type == "cpu" else [weight.device]):
            torch.manual_seed(config.random_seed)
            u, s, transposed = torch.svd_lowrank(weight, q=config.r, niter=config.psoft_svd_lowrank_niter)
        v = transposed.T
    u, s, v = u[:, : config.r], s[: config.r] * config.r / config.psoft_alpha, v[: config.r]
    up, down = (u * s, v.clone()) if config.ab_svd_init == "psoft_init" else balanced(u, s, v)
    return {A: down, B: up}


def _orthogonal(settings: PsoftConfig, skew: Tensor) -> Tensor:
    """Return the Cayley transform of ``skew``, or its series."""
    if not settings.use_cayley_neumann:
        return cayley(-skew)
    if settings.cayley_neumann_eps is not None:
        # At most that long; written so that zeros, from which training starts, have a gradient.
        skew = skew * (settings.cayley_neumann_eps / skew.norm().clamp_min(settings.cayley_neumann_eps))
    return neumann(skew, settings.num_cayley_neumann_terms)
