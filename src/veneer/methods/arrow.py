"""Arrow: each token goes to the LoRAs that would change it most (Ostapenko et al. 2024, arXiv:2405.11157, section 3.2).

    y' = y + sum_i w_i scale_i B_i A_i x        w = softmax over the top k of |v_i . x| / temperature

``v_i``, (in,), is the direction that ``B_i A_i`` lengthens most: its first right singular vector. With ``use_gks`` the
mean ``A`` and ``B`` of general adapters are taken off each ``A_i`` and ``B_i`` first (GenKnowSub, Bagherifard et al.
2025, ACL short papers 54).

It is a LoRA whose config has an ``arrow_config``. Its own A and B do nothing; they are there because peft saves them.
peft estimates ``v_i`` by a few steps from a random start, and writes the subtraction into the task adapters; here the
directions are exact and the adapters stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.arrow_options import ArrowConfig
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import NoMergedFormError, UnsupportedError
from veneer.methods.base.method import BaseLayer
from veneer.methods.lora import Lora, LoraSettings
from veneer.methods.shared.expert_mixture import LiveLayer, low_rank_patches, weighted_sum
from veneer.patches.forward_call import current
from veneer.patches.fused import TensorVersions
from veneer.patches.patch import Patch
from veneer.patches.selection import Selection


@dataclass(frozen=True)
class ArrowDirections:
    """Holds the experts of one layer, general knowledge taken off, and their directions.

    Attributes:
        sources: the tensors that they were made from.
        experts: low-rank patches.
        directions: shape ``(experts, in)``.
    """

    sources: TensorVersions
    experts: list[Patch]
    directions: Tensor

    def is_current(self, selection: Selection, tensors: Sequence[Tensor]) -> bool:
        """Tell whether they were made from ``tensors`` as these are now."""
        sources = self.sources.sources
        same = len(sources) == len(tensors) and all(a is b for a, b in zip(sources, tensors, strict=True))
        return same and self.sources.is_current(selection)


class DirectionCache:
    """Keeps the directions of one layer's experts until a tensor changes; threads may share it."""

    def __init__(self) -> None:
        self._last: ArrowDirections | None = None

    def __reduce__(self) -> Any:
        return DirectionCache, ()

    @torch.no_grad()
    def directions_of(self, experts: Sequence[Patch], general: Sequence[Patch]) -> ArrowDirections:
        """Return the directions, worked out anew unless the tensors are the same."""
        tensors = [t for patch in (*experts, *general) for t in (patch.up, patch.down) if t is not None]
        last, selection = self._last, current().selection
        if last is None or not last.is_current(selection, tensors):
            sources = TensorVersions(selection, tensors)
            reduced = _less(experts, general) if general else list(experts)
            last = self._last = ArrowDirections(sources, reduced, torch.stack([_direction(patch) for patch in reduced]))
        return last


def _factors(patch: Patch) -> tuple[Tensor, Tensor]:
    """Return ``B`` and ``A`` in float32."""
    assert patch.up is not None
    assert patch.down is not None
    return patch.up.float(), patch.down.float()


def _direction(patch: Patch) -> Tensor:
    """Return the first right singular vector of ``B A``, shape ``(in,)``, float32."""
    up, down = _factors(patch)
    basis, triangle = torch.linalg.qr(down.T)
    turned = torch.linalg.svd(up @ triangle.T, full_matrices=False)[2]
    direction: Tensor = basis @ turned[0]
    return direction


def _less(experts: Sequence[Patch], general: Sequence[Patch]) -> list[Patch]:
    """Return ``experts`` without the mean ``B`` and the mean ``A`` of the general adapters."""
    ups, downs = zip(*(_factors(patch) for patch in general), strict=True)
    up, down = torch.stack(ups).mean(0), torch.stack(downs).mean(0)
    factors = [(patch, *_factors(patch)) for patch in experts]
    return [replace(patch, up=own_up - up, down=own_down - down) for patch, own_up, own_down in factors]


@dataclass(frozen=True)
class ArrowSettings(LoraSettings):
    """Holds a config's values for one layer, and the cache of its experts' directions."""

    arrow: ArrowConfig = field(default_factory=ArrowConfig)
    cache: DirectionCache = field(default_factory=DirectionCache, compare=False)


@dataclass(frozen=True)
class ArrowRoute:
    """Adds to one layer's output what the nearest experts add."""

    site: Site
    arrow: ArrowConfig
    experts: Sequence[Patch]
    directions: Tensor

    def changes(self) -> bool:
        return any(patch.changes() for patch in self.experts)

    def take(self, rows: Tensor, whole: torch.Size) -> ArrowRoute:
        return self

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        scores = (x.float() @ self.directions.T).abs()
        best, index = scores.topk(min(self.arrow.top_k, len(self.experts)), -1)
        shares = (best / self.arrow.router_temperature).softmax(-1)
        return weighted_sum(self.site, self.experts, torch.zeros_like(scores).scatter(-1, index, shares), x, training)


class Arrow(Lora):
    """Routes over LoRAs on linear layers."""

    kinds = (LinearSite,)
    leaves = tuple(replace(leaf, trained=False) for leaf in Lora.leaves)

    def settings(self, config: LoraConfig, site: Site) -> ArrowSettings:
        plain = super().settings(config, site)
        return ArrowSettings(**vars(plain), arrow=config.arrow_config or ArrowConfig())

    def check_mergeable(self, settings: LoraSettings, site: Site) -> None:
        raise NoMergedFormError(
            "Cannot merge an active Arrow router adapter: it decides for each token which LoRA changes it, so no "
            "weight can hold it.",
            hint="Use it unmerged; merge others by name: merge_adapter([...]).",
        )

    def lower(self, settings: LoraSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        assert isinstance(settings, ArrowSettings)
        # A layer on disk does not come here: merging is refused before.
        layer, arrow = cast(LiveLayer, base), settings.arrow
        experts = low_rank_patches(layer, layer.here(tuple(arrow.task_adapter_names or ())))
        general = low_rank_patches(layer, layer.here(tuple(arrow.gks_adapter_names or ()))) if arrow.use_gks else []
        if not experts:
            return Patch()
        _check_ranks(base.site, [*experts, *general] if general else [])
        prepared = settings.cache.directions_of(experts, general)
        return Patch(route=ArrowRoute(base.site, arrow, prepared.experts, prepared.directions))


METHOD = Arrow()


def _check_ranks(site: Site, patches: Sequence[Patch]) -> None:
    if len({patch.down.shape for patch in patches if patch.down is not None}) > 1:
        raise UnsupportedError(
            f"{site.name}: use_gks takes general adapters off others, and they have different ranks.",
            hint="Use adapters of one rank, or turn use_gks off.",
        )
