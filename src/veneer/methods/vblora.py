"""VB-LoRA: low-rank adaptation from a bank of vectors (Li et al. 2024, arXiv:2405.15179, section 3).

    W' = W + B A        each piece of A and B is sum_k softmax(topk(logits))_k * bank[k]

``bank``, ``(vectors, length)``, is trained and shared by all layers. A row of ``A`` is ``in / length`` pieces, a column
of ``B`` is ``out / length``. With ``save_only_topk_weights`` a checkpoint holds which vectors are mixed and, but for
the last, whose share is what remains, their shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.vblora import VBLoRAConfig
from veneer.errors import UnsupportedError
from veneer.methods.base.abilities import ChangesWhenSaved, SharesTensors
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.patches.patch import Patch
from veneer.patches.watched_parameters import detached

LOGITS_A = "vblora_logits_A"
LOGITS_B = "vblora_logits_B"
CHOICE = "_topk_indices"
SHARES = "_topk_weights"
BANK = "vblora_vector_bank"


class VBLora(Method[VBLoRAConfig, VBLoRAConfig], SharesTensors, ChangesWhenSaved):
    """Adapts linear layers."""

    kinds = (LinearSite,)
    leaves = tuple(
        leaf
        for logits in (LOGITS_A, LOGITS_B)
        for leaf in (Leaf(logits), Leaf(logits + CHOICE, trained=False, integer=True), Leaf(logits + SHARES))
    )
    shared = (Leaf(BANK),)

    def settings(self, config: VBLoRAConfig, site: Site) -> VBLoRAConfig:
        for name, side in zip(("out_features", "in_features"), site.shape, strict=True):
            if side % config.vector_length:
                raise UnsupportedError(
                    f"{site.name}: `{name}` {side} must be divisible by `vector_length` {config.vector_length}.",
                    hint="Choose one that divides both sides, or leave the layer out with exclude_modules.",
                )
        return config

    def _logits(self, settings: VBLoRAConfig, site: Site) -> dict[str, tuple[int, ...]]:
        out, inner = (side // settings.vector_length for side in site.shape)
        return {
            LOGITS_A: (settings.r, inner, settings.num_vectors),
            LOGITS_B: (out, settings.r, settings.num_vectors),
        }

    def shapes(self, settings: VBLoRAConfig, site: Site) -> dict[str, tuple[int, ...]]:
        logits = self._logits(settings, site)
        if not settings.save_only_topk_weights:
            return logits
        choices = {leaf + CHOICE: (*shape[:2], settings.topk) for leaf, shape in logits.items()}
        return {**choices, **{leaf + SHARES: (*shape[:2], settings.topk - 1) for leaf, shape in logits.items()}}

    def shared_shapes(self, config: VBLoRAConfig, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        return {BANK: (config.num_vectors, config.vector_length)}

    def make_shared(
        self, config: VBLoRAConfig, bases: Sequence[BaseLayer], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        bound = config.init_vector_bank_bound
        return {BANK: torch.empty(self.shared_shapes(config, ())[BANK]).uniform_(-bound, bound, generator=generator)}

    def init(self, new: NewLayer[VBLoRAConfig, VBLoRAConfig]) -> dict[str, Tensor]:
        std = new.config.init_logits_std
        shapes = self._logits(new.settings, new.site)
        return {leaf: new.normal(shape, std) for leaf, shape in shapes.items()}

    def on_disk(self, settings: VBLoRAConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not settings.save_only_topk_weights or LOGITS_A not in tensors:
            return tensors
        saved = {}
        for leaf, logits in tensors.items():
            best, choice = detached(logits).topk(settings.topk)
            saved[leaf + CHOICE] = choice.to(_index_dtype(settings.num_vectors))
            saved[leaf + SHARES] = best.softmax(-1)[..., :-1].contiguous()
        return saved

    def lower(self, settings: VBLoRAConfig, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        down = _mixed(settings, tensors, LOGITS_A).flatten(1)  # (r, pieces, length) -> (r, in)
        up = _mixed(settings, tensors, LOGITS_B).mT.flatten(0, 1)  # (pieces, r, length) -> (out, r)
        return Patch(up=up, down=down, dropout=settings.vblora_dropout)


METHOD = VBLora()


def _mixed(settings: VBLoRAConfig, tensors: Mapping[str, Tensor], leaf: str) -> Tensor:
    """Return the pieces: two dimensions of them, then a vector's entries."""
    if leaf in tensors:
        best, choice = tensors[leaf].topk(settings.topk)
        shares = best.softmax(-1)
    else:
        choice, known = tensors[leaf + CHOICE].long(), tensors[leaf + SHARES]
        shares = torch.cat([known, 1 - known.sum(-1, keepdim=True)], -1)
    return (shares.unsqueeze(-1) * tensors[BANK][choice]).sum(-2)


def _index_dtype(count: int) -> torch.dtype:
    """Return the smallest dtype for an index below ``count``, as peft chooses it."""
    kinds = ((2**8, torch.uint8), (2**15, torch.int16), (2**31, torch.int32))
    return next((dtype for limit, dtype in kinds if count < limit), torch.int64)
