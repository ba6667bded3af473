"""The places in a weight of a sparse method's numbers, drawn from the config's seed."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.base_model.sites.site import Site
from veneer.errors import UnsupportedError


def random_places(site: Site, count: int, seed: int | None) -> Tensor:
    """Return the first ``count`` of a seeded permutation of a canonical weight's entries, shape ``(count,)``, int64.

    Args:
        site: the layer.
        count: at most as many as it has.
        seed: ``None`` for a generator as torch makes it, which always begins in the same way.

    Raises:
        UnsupportedError: the layer has fewer entries.
    """
    size = site.shape[0] * site.shape[1]
    if count > size:
        raise UnsupportedError(
            f"{site.name} has {size} weights, and the config asks for {count} trained numbers there.",
            hint="Ask for fewer, or leave the layer out with exclude_modules.",
        )
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    return torch.randperm(size, generator=generator)[:count]
