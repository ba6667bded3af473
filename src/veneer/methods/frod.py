"""FRoD: full-rank adaptation in a basis that the layers of one role share.

    W = U diag(l) V^T        W' = U (S + diag(l)) V^T        V: (in, in), U: (out, in), l: (in,), S: sparse (in, in)

``V`` comes from a joint decomposition of the weights of all layers of a role (Ponnapalli et al. 2011, higher-order
generalised SVD); ``U`` and the first ``l`` are what ``W`` is in it, the columns of ``U`` of length one. ``l`` and the
entries of ``S``, at random places off the diagonal, are trained. ``U`` is in no checkpoint and worked out again; so is
``V`` without ``save_projection``, and then an adapter means what it meant only on the very same weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.frod import FrodConfig
from veneer.errors import UnsupportedError
from veneer.methods.base.abilities import DerivesTensors
from veneer.methods.base.method import BaseLayer, Leaf, NewLayer, UniformMethod
from veneer.methods.shared.random_projection import SharesProjection
from veneer.patches.patch import Patch

LENGTHS, ENTRIES = "frod_lambda_l", "frod_lambda_s_values"
V, PLACES, SIZE = "frod_V", "frod_s_indices", "frod_s_size"
U = "frod_U"


class Frod(UniformMethod[FrodConfig], SharesProjection, DerivesTensors):
    """Adapts linear layers."""

    kinds = (LinearSite,)
    leaves = (Leaf(LENGTHS), Leaf(ENTRIES))
    shared = (
        Leaf(V, trained=False),
        Leaf(PLACES, trained=False, integer=True),
        Leaf(SIZE, trained=False, integer=True),
    )

    def shapes(self, settings: FrodConfig, site: Site) -> dict[str, tuple[int, ...]]:
        return {LENGTHS: (site.shape[1],), ENTRIES: (_count(settings, site.shape[1]),)}

    def shared_shapes(self, config: FrodConfig, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for site in sites:
            role, inner = _role(site.name), site.shape[1]
            shapes.update({f"{V}.{role}": (inner, inner), f"{PLACES}.{role}": (2, _count(config, inner))})
            shapes[f"{SIZE}.{role}"] = (2,)
        return shapes

    def make_shared(
        self, config: FrodConfig, bases: Sequence[BaseLayer], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        seeded = torch.Generator().manual_seed(config.projection_prng_key)
        tensors: dict[str, Tensor] = {}
        for role in sorted({_role(base.site.name) for base in bases}):
            weights = [base.base_weight().float().cpu() for base in bases if _role(base.site.name) == role]
            inner = weights[0].shape[1]
            with _of_full_rank(role):
                tensors[f"{V}.{role}"] = _basis(weights, config.regularization_alpha).contiguous()
            tensors[f"{PLACES}.{role}"] = _places(inner, _count(config, inner), seeded)
            tensors[f"{SIZE}.{role}"] = torch.tensor([inner, inner])
        return tensors

    def init(self, new: NewLayer[FrodConfig, FrodConfig]) -> dict[str, Tensor]:
        entries = torch.zeros(_count(new.settings, new.site.shape[1]))
        return {ENTRIES: entries if new.config.init_weights else entries.normal_(std=0.1, generator=new.generator)}

    def extra_tensors(
        self, config: FrodConfig, bases: Sequence[BaseLayer], shared: Mapping[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        extra = []
        for base in bases:
            role = _role(base.site.name)
            basis = shared[f"{V}.{role}"]
            with _of_full_rank(base.site.name):
                left = torch.linalg.solve(basis.double(), base.base_weight().double().T).T
            lengths = left.norm(dim=0)
            unit = left / lengths.clamp_min(1e-12)
            extra.append({V: basis, PLACES: shared[f"{PLACES}.{role}"], U: unit.float(), LENGTHS: lengths.float()})
        return extra

    def lower(self, settings: FrodConfig, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        places = tensors[PLACES]
        middle = torch.diag(tensors[LENGTHS].float()).index_put(
            (places[0], places[1]), tensors[ENTRIES].float(), accumulate=True
        )
        whole = tensors[U].float() @ middle @ tensors[V].float().T
        return Patch(dense=whole - base.base_weight().float(), dropout=settings.frod_dropout)


METHOD = Frod()


def _count(config: FrodConfig, inner: int) -> int:
    """Return the number of entries of ``S`` that are trained."""
    free = inner * (inner - 1)
    return max(1, min(int(inner * inner * config.sparse_rate), free)) if config.sparse_rate > 0 and free else 0


def _role(name: str) -> str:
    """Return what layers of one role have in common: the last two parts of their name."""
    parts = name.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    return "attention_output" if parts[-3:] == ["attention", "output", "dense"] else "_".join(parts[-2:])


def _places(inner: int, count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` places off the diagonal, ``(2, count)``, drawn as peft draws them."""
    index = torch.arange(inner)
    free = torch.cartesian_prod(index, index)
    free = free[free[:, 0] != free[:, 1]]
    return free[torch.randperm(len(free), generator=generator)[:count]].T.contiguous()


def _basis(weights: Sequence[Tensor], ridge: float) -> Tensor:
    """Return ``V`` of the layers of one role."""
    stacked = torch.cat(list(weights))
    if stacked.shape[0] < stacked.shape[1]:
        right: Tensor = torch.linalg.svd(stacked, full_matrices=True)[2]
        return right.T
    q, r = torch.linalg.qr(stacked)
    identity = ridge * torch.eye(r.shape[1])
    inverses = [torch.linalg.inv(part.T @ part + identity) for part in q.split([len(weight) for weight in weights])]
    directions: Tensor = torch.linalg.eigh(torch.stack(inverses).mean(0))[1]
    basis: Tensor = r.T @ directions
    return basis


@contextmanager
def _of_full_rank(name: str) -> Iterator[None]:
    """Refuse weights that cannot be written in a basis: torch has no public name for a singular matrix's error."""
    try:
        yield
    except RuntimeError as error:
        raise UnsupportedError(
            f"{name}: the weights leave out some of their inputs, so that FRoD finds no basis for them.",
            hint="Leave these layers out with exclude_modules.",
        ) from error
