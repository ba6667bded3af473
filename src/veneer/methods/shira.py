"""SHiRA: sparse high-rank adapters (Bhardwaj et al. 2024, arXiv:2406.13175, section 3).

    W' = W + S      S: sparse, r * (in + out) trained numbers ``shira_weight`` at ``shira_indices``, (2, n): row, column

A new adapter has the mask "SHiRA-Rand": places that are drawn from the config's seed; or, with ``mask_type="custom"``,
the ones of ``config.mask_fn(layer, r)``. Those of a checkpoint are in it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.shira import ShiraConfig
from veneer.errors import ConfigError, UnsupportedError
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.methods.shared.random_entries import random_places
from veneer.patches.operators import Sparse
from veneer.patches.patch import Patch

VALUES = "shira_weight"
PLACES = "shira_indices"


class Shira(Method[ShiraConfig, int]):
    """Adapts linear layers; its settings are the count of a layer's trained numbers."""

    leaves = (Leaf(VALUES), Leaf(PLACES, trained=False, integer=True))
    kinds = (LinearSite,)

    def settings(self, config: ShiraConfig, site: Site) -> int:
        return config.r * sum(site.shape)

    def shapes(self, settings: int, site: Site) -> dict[str, tuple[int, ...]]:
        return {VALUES: (settings,), PLACES: (2, settings)}

    def init(self, new: NewLayer[ShiraConfig, int]) -> dict[str, Tensor]:
        chosen = new.config.mask_type == "random"
        places = random_places(new.site, new.settings, new.config.random_seed) if chosen else _masked(new)
        places = places.sort().values
        values = new.normal((new.settings,), 0.0 if new.config.init_weights else 1.0)
        columns = new.site.shape[1]
        return {VALUES: values, PLACES: torch.stack([places // columns, places % columns]).int()}

    def lower(self, settings: int, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        row, column = tensors[PLACES].int()
        return Patch(dense=Sparse(tensors[VALUES], row, column, base.site.shape))


def _masked(new: NewLayer[ShiraConfig, int]) -> Tensor:
    """Return the places of the ones in the mask that the config's own function makes of a layer."""
    config, site = new.config, new.site
    if config.mask_fn is None:
        raise UnsupportedError(
            f"mask_type={config.mask_type!r} needs a function of one's own, and config.mask_fn is None.",
            hint="Set config.mask_fn = f, with f(layer, r) returning the mask; or use mask_type='random'.",
        )
    mask = config.mask_fn(site.module, config.r)
    shape, ones = tuple(mask.shape), int(mask.count_nonzero())
    if (shape, ones) != (site.stored_shape, new.settings):
        raise ConfigError(
            f"{site.name}: the mask of config.mask_fn has the shape {shape} and {ones} ones; {site.stored_shape} and "
            f"{new.settings} are needed.",
            hint=f"There are r * (rows + columns) ones, with r={config.r}.",
        )
    return site.canonical(mask).flatten().nonzero().flatten().cpu()


METHOD = Shira()
