"""The names of a method's tensors in a checkpoint, and what becomes of each."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass


@dataclass(frozen=True)
class Leaf:
    """Names one tensor of a method, and says how it is trained, saved and loaded.

    Attributes:
        name: its name in a checkpoint, behind its layer's.
        trained: whether training changes it.
        saved: whether a checkpoint holds it; one that it does not hold is worked out again when it is loaded.
        loaded: whether it is read from a checkpoint; peft writes some that say nothing.
        moves_bias: whether it moves a layer's output as a bias does, even where the layer has none.
        integer: whether it holds whole numbers, such as the places of values.
        memory_name: its name in memory, where the adapter's name follows its first part; by default its name.
    """

    name: str
    _: KW_ONLY
    trained: bool = True
    saved: bool = True
    loaded: bool = True
    moves_bias: bool = False
    integer: bool = False
    memory_name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory_name", self.memory_name or self.name)
