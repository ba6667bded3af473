"""A merge into packed (quantised) weights: users choose the form of the sum, and its loss is measured.

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

# A change of which more than this share is rounded away counts as lost.
LOST = 0.5


@dataclass(frozen=True)
class Into:
    """The form that a merge gives a packed layer.

    Attributes:
        choice: "dequantized" or "requantized".
        dtype: of a dequantised layer.
    """

    choice: str
    dtype: torch.dtype


def into_missing(layer: str) -> MergeError:
    """Return the error for a merge into a packed layer that does not say which form its sum gets."""
    return MergeError(
        f"{layer} is quantised, and a merge has to know where to put the sum.",
        hint=f'Pass into="{DEQUANTIZED}" (plain layers: several times larger, one rounding) or '
        f'into="{REQUANTIZED}" (packed again: as small as before, and much of a small change is rounded away).',
    )


@dataclass(frozen=True)
class LayerError:
    """The loss of one layer's merged weight, as Frobenius norms.

    Attributes:
        weight: of the difference to the exact (float32) sum, relative to that sum.
        change: of the same difference, relative to the adapter's change; 1 is as much as the adapter itself.
    """

    weight: float
    change: float


@dataclass(frozen=True)
class QuantizedMerge(AsJson):
    """The outcome of the last merge into packed weights: ``model.quantized_merge``.

    Attributes:
        into: "dequantized" or "requantized".
        layers: layer's name -> its loss.
    """

    into: str
    layers: Mapping[str, LayerError] = field(default_factory=dict)

    @property
    def worst(self) -> LayerError:
        """The largest figures of any layer."""
        errors = self.layers.values()
        return LayerError(max(e.weight for e in errors), max(e.change for e in errors))

    @property
    def lost(self) -> list[str]:
        """The layers in which more than half of the adapter's change is rounded away."""
        return [name for name, error in self.layers.items() if error.change > LOST]

    def warning(self) -> str:
        """Return a line for the user when some of the adapter did not survive."""
        return (
            f"Packing the merged weights again lost more than half of the adapter's change in {len(self.lost)} of "
            f"{len(self.layers)} layers (at worst {self.worst.change:.0%} of it): the grid is coarser than the change. "
            f'Keep the adapter unmerged, or merge with into="{DEQUANTIZED}".'
        )


def layer_error(held: Tensor, exact: Tensor, before: Tensor) -> LayerError:
    """Measure the loss of a layer.

    Args:
        held: the weight that it holds after the merge, shape ``(out, in)``, float32.
        exact: the sum in float32.
        before: the weight before the merge, float32.
    """
    lost, change = (held - exact).norm(), (exact - before).norm()
    return LayerError(_ratio(lost, exact.norm()), _ratio(lost, change))


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a / b) if float(b) else 0.0
