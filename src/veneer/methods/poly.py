"""Poly: each task mixes low-rank skills in its own way (Ponti et al. 2022, arXiv:2202.13914, section 3).

    y' = y + x A_t B_t / r        A_t = sum_s w_ts A_s,  B_t = sum_s w_ts B_s
    w_t = z_t / sum z_t           z_t = sigmoid(Z_t), in training a relaxed Bernoulli sample of it

    A: (splits, skills, in / splits, r), B: (splits, skills, r, out / splits), Z: (tasks, splits * skills)

Each split of input and output has its own mixture (multi-head routing, Caccia et al. 2022, arXiv:2211.03831). A call
names the task of each row: ``model(..., task_ids=tensor)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import RelaxedBernoulli

from veneer.base_model.sites.site import Site
from veneer.configs.methods.poly import PolyConfig
from veneer.errors import AdapterError, UnsupportedError
from veneer.methods.base.method import BaseLayer, Leaf, NewLayer
from veneer.methods.base.routed_method import RoutedMethod
from veneer.patches.forward_call import selected_tasks
from veneer.patches.patch import Patch

A = "poly_lora_A"
B = "poly_lora_B"
LOGITS = "poly_router.module_logits"
# Keeps a task that uses no skill from dividing by zero.
TINY = 1e-12


@dataclass(frozen=True)
class PolyRoute:
    """Adds to one layer's output by the skills of each row's task.

    Attributes:
        a: ``A``.
        b: ``B``.
        logits: ``Z``.
        rows: the rows of the batch that the layer is given; all when ``None``.
        length: rows of the whole batch, where only some are given.
    """

    a: Tensor
    b: Tensor
    logits: Tensor
    rows: Tensor | None = None
    length: int | None = None

    def changes(self) -> bool:
        return bool(self.a.count_nonzero()) and bool(self.b.count_nonzero())

    def take(self, rows: Tensor, whole: torch.Size) -> PolyRoute:
        return replace(self, rows=rows, length=whole[0])

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        weights = self._weights(self._tasks(x.shape[0]), training)
        rank = self.a.shape[-1]
        down = torch.einsum("bqs,qsdr->bqdr", weights, self.a).flatten(1, 2)
        up = torch.einsum("bqs,qsrd->brqd", weights, self.b).flatten(2)
        flat = x.reshape(x.shape[0], -1, x.shape[-1]).to(down.dtype)
        return (flat @ down @ up / rank).view(*x.shape[:-1], -1)

    def _weights(self, tasks: Tensor, training: bool) -> Tensor:
        """Return the share of each skill, ``(rows, splits, skills)``."""
        logits = self.logits[tasks].view(len(tasks), *self.a.shape[:2])
        if training:
            used = RelaxedBernoulli(temperature=logits.new_ones(()), logits=logits).rsample()
        else:
            used = logits.sigmoid()
        return used / (used.sum(-1, keepdim=True) + TINY)

    def _tasks(self, length: int) -> Tensor:
        tasks = selected_tasks(length if self.length is None else self.length)
        if tasks is None:
            raise AdapterError(
                "A Poly adapter is active, and the call says nothing of tasks.",
                hint="Give each row's: model(..., task_ids=torch.tensor([0, ...])).",
            )
        tasks = tasks.to(self.logits.device)
        tasks = tasks if self.rows is None else tasks[self.rows]
        if tasks.numel() and not 0 <= int(tasks.min()) <= int(tasks.max()) < len(self.logits):
            raise AdapterError(
                f"task_ids={tasks.tolist()} names a task that is not there.",
                hint=f"There are {len(self.logits)}, from 0.",
            )
        return tasks


class Poly(RoutedMethod[PolyConfig, PolyConfig]):
    """Adapts linear layers, each task in its own way."""

    leaves = (Leaf(A), Leaf(B), Leaf(LOGITS))

    def settings(self, config: PolyConfig, site: Site) -> PolyConfig:
        if any(size % config.n_splits for size in site.shape):
            raise UnsupportedError(
                f"{site.name} is {site.shape}, which n_splits={config.n_splits} does not divide.",
                hint="Choose another n_splits, or leave the layer out with exclude_modules.",
            )
        return config

    def shapes(self, settings: PolyConfig, site: Site) -> dict[str, tuple[int, ...]]:
        splits, skills, (out, inner) = settings.n_splits, settings.n_skills, site.shape
        return {
            A: (splits, skills, inner // splits, settings.r),
            B: (splits, skills, settings.r, out // splits),
            LOGITS: (settings.n_tasks, splits * skills),
        }

    def init(self, new: NewLayer[PolyConfig, PolyConfig]) -> dict[str, Tensor]:
        shapes = self.shapes(new.settings, new.site)
        bounds = {A: 1 / math.sqrt(shapes[A][2]), B: 1 / math.sqrt(new.config.r), LOGITS: 1e-3}
        if new.config.init_weights:
            bounds[B] = 0.0
        return {leaf: new.uniform(shape, bounds[leaf]) for leaf, shape in shapes.items()}

    def lower(self, settings: PolyConfig, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        return Patch(route=PolyRoute(tensors[A], tensors[B], tensors[LOGITS]))


METHOD = Poly()
