"""The interface that a patch needs of a layer: how matrices and vectors act on its input and output."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor


class LayerForm(Protocol):
    """One kind of base layer, as a patch sees it; a ``Site`` satisfies it.

    Attributes:
        channel: the dimension of the layer's output that has ``out`` entries.
        matrix_input: whether the layer's input is ``(..., in)``, so that a multiplier can be applied to it.
        products: whether :meth:`product` is possible; without it a patch is applied through the whole weight.
        shift_only: whether a patch can only move the bias here.
    """

    channel: ClassVar[int]
    matrix_input: ClassVar[bool]
    products: ClassVar[bool]
    shift_only: ClassVar[bool]

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Apply ``matrix``, shape ``(rows, in)``, to the layer's input as the layer's weight is applied."""
        ...

    def mix(self, hidden: Tensor, matrix: Tensor) -> Tensor:
        """Apply ``matrix``, shape ``(out, rows)``, to the result of :meth:`product`."""
        ...

    def vectors(self, places: Tensor, table: Tensor, padding: int | None) -> Tensor:
        """Look rows of ``table`` up as the layer does; of an embedding alone. Row ``padding`` gets no gradient."""
        ...

    def expand(self, vector: Tensor, output: Tensor) -> Tensor:
        """Give a vector ``(out,)`` the shape that broadcasts over the layer's output."""
        ...
