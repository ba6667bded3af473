"""Takes the LoRA of fused experts apart and puts it together: PEFT's two matrices, and a stack with a matrix for each.

    PEFT:    A (experts * r, in), experts slowest;  B (out, r * experts), experts fastest
    stacks:  A (experts, r, in);                    B (experts, out, r)

transformers keeps gate and up in one parameter, other tools apart: both halves have the parameter's A, and each has its
rows of B. Where two halves have an A each, the parameter has a LoRA of the rank of both together:

    A = [A_gate ; A_up]        B = [[B_gate, 0], [0, B_up]]
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.formats.canonical import ModuleChange
from veneer.formats.scaling import multiplied

A, B = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True)
class ExpertStack:
    """The LoRA of one matrix of all experts of a layer.

    Attributes:
        down: ``(experts, r, in)``.
        up: ``(experts, out, r)``.
        scale: what their product is multiplied by.
    """

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """The rank."""
        return self.down.shape[1]


def stack_of(change: ModuleChange) -> ExpertStack:
    """Return the stacks of a parameter's change."""
    down, up = change.leaves[A], change.leaves[B]
    experts = down.shape[0] // change.rank
    return ExpertStack(down.unflatten(0, (experts, -1)), up.unflatten(1, (-1, experts)).permute(2, 0, 1), change.scale)


def change_of(path: str, stack: ExpertStack) -> ModuleChange:
    """Return the change of the parameter at ``path`` whose stacks these are."""
    leaves = {A: stack.down.flatten(0, 1), B: stack.up.permute(1, 2, 0).flatten(1)}
    return ModuleChange(path, "LORA", leaves, stack.rank, stack.scale, is_parameter=True)


def halves(stack: ExpertStack, interleaved: bool) -> tuple[ExpertStack, ExpertStack]:
    """Return the stacks of gate and up, given that of both.

    Args:
        stack: the stack of both.
        interleaved: True where the even rows are the gate's and the odd ones up's (gpt-oss), and not the first half.
    """
    gate, up = (stack.up[:, 0::2], stack.up[:, 1::2]) if interleaved else stack.up.chunk(2, 1)
    return replace(stack, up=gate), replace(stack, up=up)


def both(gate: ExpertStack | None, up: ExpertStack | None, interleaved: bool) -> ExpertStack:
    """Return the stack of gate and up together; the inverse of :func:`halves` where both have the same A.

    It has the scale of the gate; another one of up is folded into its B.

    Args:
        gate: the stack of the gate; ``None`` where it has none.
        up: the same of up; one of both is there.
        interleaved: as for :func:`halves`.
    """
    if gate is None or up is None:
        present = gate or up
        assert present is not None
        nothing = replace(present, up=torch.zeros_like(present.up))
        return _joined(gate or nothing, up or nothing, interleaved)
    if gate.scale == up.scale and torch.equal(gate.down, up.down):
        return _joined(gate, up, interleaved)
    if gate.scale != up.scale:
        up = replace(up, up=multiplied(up.up, up.scale / gate.scale), scale=gate.scale)
    pad, r, r_up = torch.nn.functional.pad, gate.rank, up.rank
    down = torch.cat([gate.down, up.down], 1)
    return _joined(
        ExpertStack(down, pad(gate.up, (0, r_up)), gate.scale),
        ExpertStack(down, pad(up.up, (r, 0)), gate.scale),
        interleaved,
    )


def _joined(gate: ExpertStack, up: ExpertStack, interleaved: bool) -> ExpertStack:
    """Join the rows of two halves that have the same A."""
    rows = torch.stack([gate.up, up.up], 2).flatten(1, 2) if interleaved else torch.cat([gate.up, up.up], 1)
    return replace(gate, up=rows)
