"""Sites of layers of other kinds that have one weight, for methods that train whole layers.

The canonical matrix has a row for each entry of the weight's first dimension.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from veneer.base_model.sites.site import Site


class WholeSite(Site):
    """A layer that uses its weight in its own ``forward``, so a patch acts through the whole changed weight."""

    products = False
    has_low_rank_form = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], math.prod(self.stored.shape[1:])

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.stored.shape)


def is_whole(module: nn.Module) -> bool:
    """Tell whether a module holds nothing but a floating weight of two dimensions or more, and perhaps a bias."""
    weight = module._parameters.get("weight")
    alone = module._parameters.keys() <= {"weight", "bias"} and not module._modules and not module._buffers
    return alone and weight is not None and weight.ndim > 1 and weight.is_floating_point() and weight.itemsize > 1
