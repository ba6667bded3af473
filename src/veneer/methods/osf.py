"""OSF: orthogonal subspace fine-tuning (Nayak et al. 2025, arXiv:2504.07097, section 3).

    W = U S V^T        W' = W + (U' S' V'^T - U_low S_low V_low^T)        U': (out, m), S': (m,), V'^T: (m, in)

The last ``m`` singular directions of the base are trained, from what they are. The first are left alone: the gradients
of ``U'`` and ``V'`` are kept orthogonal to them. What ``U'``, ``S'`` and ``V'`` started from is in no checkpoint and
worked out again from the base; the difference does not depend on the signs of the decomposition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.osf import OSFConfig
from veneer.configs.patterns import PART, match
from veneer.methods.base.abilities import DerivesTensors
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.patches.patch import Patch

U, S, V = (f"osf_svd_params.{part}_low" for part in "USV")
BASE_U, BASE_S, BASE_V = (f"osf_{part}" for part in "USV")


class OSF(Method[OSFConfig, int], DerivesTensors):
    """Adapts linear layers; its settings are the number of directions that are kept."""

    kinds = (LinearSite,)
    leaves = (Leaf(U), Leaf(S), Leaf(V))

    def settings(self, config: OSFConfig, site: Site) -> int:
        small, chosen = min(site.shape), config.effective_rank
        ranks = [rank for pattern, rank in (config.rank_pattern or {}).items() if match(pattern, PART, site.name)]
        chosen = ranks[0] if ranks else chosen
        if chosen is None:
            return small // 2
        share = isinstance(chosen, float) and 0 < chosen <= 1
        return min(small, int(small * chosen if share else chosen))

    def shapes(self, settings: int, site: Site) -> dict[str, tuple[int, ...]]:
        out, inner = site.shape
        trained = min(out, inner) - settings
        return {U: (out, trained), S: (trained,), V: (trained, inner)}

    def init(self, new: NewLayer[OSFConfig, int]) -> dict[str, Tensor]:
        if new.config.init_weights is False:
            shapes = self.shapes(new.settings, new.site)
            return {leaf: new.normal(shape) for leaf, shape in shapes.items()}
        u, s, v = torch.linalg.svd(new.base.base_weight().float(), full_matrices=False)
        return {U: u[:, new.settings :].contiguous(), S: s[new.settings :].clone(), V: v[new.settings :].contiguous()}

    def extra_tensors(
        self, config: OSFConfig, bases: Sequence[BaseLayer], shared: Mapping[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        parts = (torch.linalg.svd(base.base_weight().float(), full_matrices=False) for base in bases)
        return [{BASE_U: u, BASE_S: s, BASE_V: v} for u, s, v in parts]

    def lower(self, settings: int, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        count, u, s, v = settings, tensors[BASE_U], tensors[BASE_S], tensors[BASE_V]
        left = _away_from(u[:, :count], tensors[U].float())
        right = _away_from(v[:count].T, tensors[V].T.float()).T
        up = torch.cat([left * tensors[S].float(), -u[:, count:] * s[count:]], 1)
        return Patch(up=up, down=torch.cat([right, v[count:]]))


METHOD = OSF()


def _away_from(directions: Tensor, trained: Tensor) -> Tensor:
    """Return ``trained``, whose gradient loses its share in the columns of ``directions``."""
    if not (torch.is_grad_enabled() and trained.requires_grad):
        return trained
    free = trained - directions @ (directions.T @ trained)
    return free + (trained - free).detach()
