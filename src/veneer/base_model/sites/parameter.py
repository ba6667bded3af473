"""Sites of weights inside a larger layer: fused experts, and the projections of ``nn.MultiheadAttention``.

The layer uses them inside its own ``forward``, so an adapter acts on them only through the whole changed weight.
"""

from __future__ import annotations

from torch import Tensor, nn

from veneer.base_model.sites.site import Site
from veneer.base_model.sites.vector import ColumnSite


class ParameterSite(Site):
    """One parameter of a module: a matrix ``(out, in)``, or a stack of them ``(experts, out, in)``.

    Args:
        swapped: whether it is stored as ``(..., in, out)``: experts that say ``is_transposed``.
        gain: multiplies every LoRA. peft (0.21) adds its LoRA of attention's output projection twice, in training
            too, so an adapter was trained to be added twice.
        targeted: whether a config names the parameter itself, not its layer.
    """

    products = False
    inside_layer = True

    def __init__(
        self,
        name: str,
        module: nn.Module,
        parameter: str,
        key: str,
        swapped: bool = False,
        gain: float = 1.0,
        targeted: bool = False,
    ) -> None:
        super().__init__(name, module, parameter, key)
        self.swapped = swapped
        self.low_rank_gain = gain
        self.targeted = targeted

    @property
    def id(self) -> str:
        return f"{self.name}:{self.parameter}"

    @property
    def pattern_name(self) -> str:
        return f"{self.name}.{self.parameter}" if self.targeted else self.name

    @property
    def stack(self) -> int | None:
        return self.stored.shape[0] if self.stored.ndim == 3 else None

    def low_rank_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return super().low_rank_shapes(r * (self.stack or 1))

    def low_rank_factors(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        if self.stack is None:
            return up, down
        # The experts lie apart in A and interleaved in B: (experts * r, in) and (out, r * experts).
        return up.unflatten(1, (-1, self.stack)).permute(2, 0, 1), down.unflatten(0, (self.stack, -1))

    def _stored_low_rank(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        up = up / self.low_rank_gain
        return (down, up) if self.stack is None else (down.flatten(0, 1), up.permute(1, 2, 0).flatten(1))

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.stored.shape[-2:]
        return (columns, rows) if self.swapped else (rows, columns)

    @property
    def bias(self) -> nn.Parameter | None:
        """Always ``None``: the layer's biases belong to no single parameter."""
        return None

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.mT if self.swapped else stored

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.swapped else matrix


class VectorSite(ColumnSite, ParameterSite):
    """A bias that a larger layer uses itself, as a matrix of one column."""

    is_bias = True
