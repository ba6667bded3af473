"""Merging into packed (quantised) weights: where the sum goes is the user's choice, and what it loses is measured.

"dequantized": the layer becomes a plain one in the model's dtype; one rounding, several times the memory.
"requantized": the sum is packed again as the weight was. A change smaller than the grid's steps is rounded away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.errors import MergeError
from veneer.printing import AsJson

DEQUANTIZED = "dequantized"
REQUANTIZED = "requantized"
CHOICES = (DEQUANTIZED, REQUANTIZED)

# Of a change of which more than this share is lost, little is left to speak of.
LOST = 0.5


@dataclass(frozen=True)
class Into:
    """Where a merge into a packed layer goes.

    Attributes:
        choice: "dequantized" or "requantized".
        dtype: of a dequantised layer.
    """

    choice: str
    dtype: torch.dtype


def into_missing(layer: str) -> MergeError:
    """The error for a merge into a packed layer that does not say where its sum goes."""
    return MergeError(
        f"{layer} is quantised, and a merge has to know where to put the sum.",
        hint=f'Pass into="{DEQUANTIZED}" (plain layers: several times larger, one rounding) or '
        f'into="{REQUANTIZED}" (packed again: as small as before, and much of a small change is rounded away).',
    )


@dataclass(frozen=True)
class LayerError:
    """What one layer's merged weight lost, as Frobenius norms.

    Attributes:
        weight: of the difference to the exact (float32) sum, relative to that sum.
        change: of the same difference, relative to the adapter's change; 1 is as much as the adapter itself.
    """

    weight: float
    change: float


@dataclass(frozen=True)
class QuantizedMerge(AsJson):
    """What the last merge into packed weights did: ``model.quantized_merge``.

    Attributes:
        into: "dequantized" or "requantized".
        layers: layer's name -> what it lost.
    """

    into: str
    layers: Mapping[str, LayerError] = field(default_factory=dict)

    @property
    def worst(self) -> LayerError:
        """The largest figures of any layer."""
        found = self.layers.values()
        return LayerError(max(e.weight for e in found), max(e.change for e in found))

    @property
    def lost(self) -> list[str]:
        """The layers in which more than half of the adapter's change is rounded away."""
        return [name for name, error in self.layers.items() if error.change > LOST]

    def warning(self) -> str:
        """A line for the user when some of the adapter did not survive."""
        return (
            f"Packing the merged weights again lost more than half of the adapter's change in {len(self.lost)} of "
            f"{len(self.layers)} layers (at worst {self.worst.change:.0%} of it): the grid is coarser than the change. "
            f'Keep the adapter unmerged, or merge with into="{DEQUANTIZED}".'
        )


def layer_error(held: Tensor, exact: Tensor, before: Tensor) -> LayerError:
    """What a layer lost.

    Args:
        held: the weight that it holds after the merge, shape ``(out, in)``, float32.
        exact: the sum in float32.
        before: the weight before the merge, float32.
    """
    lost, change = (held - exact).norm(), (exact - before).norm()
    return LayerError(_ratio(lost, exact.norm()), _ratio(lost, change))


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a / b) if float(b) else 0.0
