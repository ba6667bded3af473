"""AdaMSS: adaptive multi-subspaces (Zheng et al. 2025, NeurIPS, section 3).

    rows g of W' = rows g of W + B_g A_g V        V: (r, in), A_g: (k, r), B_g: (rows of g, k)

``W``, decomposed into ``U S V``, is cut off at r directions, and the rows of ``U`` are clustered: a group ``g`` is what
rows of ``W`` are alike. Where the layer has a bias it is one more column of ``W``, and moves too. ``V`` is saved. Which
rows are in which group is in no checkpoint and is worked out again from the base, by the same seeded steps; so an
adapter belongs to that base in that dtype, and is refused where the groups come out in other sizes. Training may
freeze, over all layers, the groups that matter least (``group_allocation.py``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.adamss import AdamssConfig
from veneer.errors import BaseMismatchError, UnsupportedError
from veneer.methods.base.abilities import Allocates, ChangesWhenSaved, SettledByCheckpoint, VariesWithConfig
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.methods.shared.group_allocation import A, B, GroupAllocation
from veneer.packages import require
from veneer.patches.patch import Patch

V = "adamss_newB"
ROWS = "adamss_rows"


@dataclass(frozen=True)
class AdamssSettings:
    """Holds a config for one layer, and in ``sizes`` each group's number of rows and rank."""

    config: AdamssConfig
    sizes: tuple[tuple[int, int], ...]


class Adamss(Method[AdamssConfig, AdamssSettings], VariesWithConfig, SettledByCheckpoint, ChangesWhenSaved, Allocates):
    """Adapts linear layers.

    Args:
        groups: the largest number of groups of a layer.
    """

    kinds = (LinearSite,)

    def __init__(self, groups: int) -> None:
        self.downs = [f"{A}{index}" for index in range(groups)]
        self.ups = [f"{B}{index}" for index in range(groups)]
        common = (Leaf(V, trained=False), Leaf(ROWS, trained=False, saved=False))
        self.leaves = (*common, *map(Leaf, (*self.downs, *self.ups)))

    def specialised(self, config: AdamssConfig) -> Adamss:
        return Adamss(config.num_subspaces)

    def allocation(self, config: AdamssConfig) -> GroupAllocation | None:
        return GroupAllocation() if config.use_asa else None

    def settings(self, config: AdamssConfig, site: Site) -> AdamssSettings:
        # Groups of one size, until a decomposition or a checkpoint gives the true sizes.
        out, count = site.shape[0], min(config.num_subspaces, site.shape[0])
        rows = [out // count + (index < out % count) for index in range(count)]
        return AdamssSettings(config, tuple((size, min(size, config.subspace_rank)) for size in rows))

    def settings_from_shapes(
        self, config: AdamssConfig, settings: AdamssSettings, site: Site, shapes: Mapping[str, tuple[int, ...]]
    ) -> list[AdamssSettings]:
        groups = [shapes.get(leaf, ()) for leaf in self.ups[: len(settings.sizes)]]
        if any(len(shape) != 2 for shape in groups) or sum(shape[0] for shape in groups) != site.shape[0]:
            return [settings]
        return [replace(settings, sizes=tuple((rows, rank) for rows, rank in groups))]

    def shapes(self, settings: AdamssSettings, site: Site) -> dict[str, tuple[int, ...]]:
        columns = site.shape[1] + (site.bias is not None)
        r = min(settings.config.r, site.shape[0], columns)
        shapes: dict[str, tuple[int, ...]] = {V: (r, columns)}
        for down, up, (rows, rank) in zip(self.downs, self.ups, settings.sizes, strict=False):
            shapes.update({down: (rank, r), up: (rows, rank)})
        return shapes

    def init(self, new: NewLayer[AdamssConfig, AdamssSettings]) -> dict[str, Tensor]:
        left, right = _decomposed(new.config, new.base)
        groups = _groups(new.config, left, new.site)
        tensors = {V: right, ROWS: torch.cat(groups)}
        for down, up, rows in zip(self.downs, self.ups, groups, strict=False):
            tensors[down] = _directions(new.config, left[rows])
            shape = (len(rows), len(tensors[down]))
            zero = new.config.init_weights == "orthogonal"
            tensors[up] = torch.zeros(shape) if zero else 0.01 * new.normal(shape)
        return tensors

    def recomputed(
        self, config: AdamssConfig, settings: AdamssSettings, base: Callable[[], BaseLayer]
    ) -> dict[str, Tensor]:
        layer = base()
        groups = _groups(config, _decomposed(config, layer)[0], layer.site)
        sizes, stored = [len(rows) for rows in groups], [rows for rows, _ in settings.sizes]
        if sizes != stored:
            raise BaseMismatchError(
                f"{layer.site.name}: the base's rows fall into groups of {sizes}, and the adapter's into {stored}.",
                hint="Load the base that it was trained on, in the dtype that it had then.",
            )
        return {ROWS: torch.cat(groups)}

    def lower(self, settings: AdamssSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        inner = base.site.shape[1]
        factors = [(tensors[down], tensors[up]) for down, up in zip(self.downs, self.ups, strict=True) if up in tensors]
        grouped = torch.block_diag(*(up for _, up in factors))
        up = torch.zeros_like(grouped).index_copy(0, tensors[ROWS], grouped)
        down = torch.cat([down for down, _ in factors]).float() @ tensors[V].float()
        shift = up.float() @ down[:, inner] if down.shape[1] > inner else None
        return Patch(up=up, down=down[:, :inner], shift=shift)


METHOD = Adamss(1)


def _decomposed(config: AdamssConfig, base: BaseLayer) -> tuple[Tensor, Tensor]:
    """Return ``U`` (out, r) and ``V`` (r, in) of a seeded, randomised decomposition, as in peft."""
    weight, bias = base.base_weight().float(), base.base_bias
    if bias is not None:
        weight = torch.cat([weight, bias.detach().float().unsqueeze(1)], 1)
    devices = [] if weight.device.type == "cpu" else [weight.device]
    with torch.random.fork_rng(devices=devices, device_type=weight.device.type if devices else "cuda"):
        torch.manual_seed(config.random_seed)
        left, _, right = torch.svd_lowrank(weight, q=min(config.r, *weight.shape), niter=2)
    return left, right.T.contiguous()


def _groups(config: AdamssConfig, left: Tensor, site: Site) -> list[Tensor]:
    """Return the rows of each group of a layer, from its ``U``."""
    require("AdaMSS, which groups rows by k-means,", "scikit-learn", extra="adamss")
    kmeans = importlib.import_module("sklearn.cluster").KMeans
    # The options are the method's definition: with others a checkpoint's groups would be other rows.
    count = min(config.num_subspaces, len(left))
    machine = kmeans(n_clusters=count, init="random", n_init=1, max_iter=10, random_state=123456789)
    labels = torch.from_numpy(machine.fit_predict(left.cpu().numpy())).to(left.device)
    groups = [(labels == label).nonzero().flatten() for label in range(count)]
    if not all(map(len, groups)):
        raise UnsupportedError(
            f"{site.name}: its rows do not fall into {count} groups, so many are the same.",
            hint="Leave the layer out, or choose a smaller num_subspaces.",
        )
    return groups


def _directions(config: AdamssConfig, rows: Tensor) -> Tensor:
    """Return the first right singular vectors, ``(k, r)``, of a group's rows of ``U``, as many as its rank."""
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    rank = min(len(values), config.subspace_rank)
    if config.use_dynamic_rank:
        large = values.square() > config.svd_threshold * values[0].square()
        rank = max(1, min(rank, int(large.sum())))
    first: Tensor = right[:rank]
    return first.contiguous()
