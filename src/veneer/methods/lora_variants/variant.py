"""The abstract class of LoRA's variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from veneer.base_model.sites.site import Site
from veneer.methods.base.method import Leaf
from veneer.patches.patch import Patch

if TYPE_CHECKING:
    from veneer.methods.base.method import BaseLayer


LORA_A, LORA_B = Site.low_rank_names


class Variant:
    """Changes a LoRA on one layer, its options resolved. By default it leaves the plain LoRA.

    Attributes:
        leaves: its tensors beside A and B.
    """

    leaves: ClassVar[tuple[Leaf, ...]] = ()

    def shapes(self, plain: Mapping[str, tuple[int, ...]], site: Site) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors by name, from those of a plain LoRA on the layer."""
        return dict(plain)

    def init(self, base: BaseLayer, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Return its own tensors for a new adapter, float32."""
        return {}

    def recomputed(self, base: Callable[[], BaseLayer]) -> dict[str, Tensor]:
        """Return those tensors of a loaded adapter that no checkpoint holds."""
        return {}

    def patch(self, plain: Patch, tensors: Mapping[str, Tensor]) -> Patch:
        """Return what the tensors mean, from what A and B as stored would mean alone."""
        raise NotImplementedError

    def penalty(self, layers: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
        """Return what training adds to the loss, for the tensors of all layers that have this variant."""
        return None
