"""The memory that workers compute in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.adapters.merge.worker_threads import for_each
from veneer.patches import scratch_memory
from veneer.patches.patch import Patch
from veneer.patches.weight_arithmetic import merged

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def weights(dtype: torch.dtype) -> list[Tensor]:
    made = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in ((70, 33), (5, 3), (3, 40, 8), (0, 8))]
    return [*made, made[0].T, torch.randn(40, 40, dtype=torch.float64).to(dtype)[:, ::2]]


def patch(weight: Tensor) -> Patch:
    *stack, rows, columns = weight.shape
    return Patch(up=torch.randn(*stack, rows, 2), down=torch.randn(*stack, 2, columns), scale=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_workers_merge_to_the_same_bits_and_layout(dtype: torch.dtype) -> None:
    own = weights(dtype)
    patches = [patch(weight) for weight in own]
    expected = [merged(weight, [change]) for weight, change in zip(own, patches, strict=True)]
    found: dict[int, Tensor] = {}

    def run(index: int) -> None:
        found[index] = merged(own[index], [patches[index]])

    for_each(run, range(len(own)))
    for index, wanted in enumerate(expected):
        assert torch.equal(found[index], wanted)
        assert (found[index].dtype, found[index].stride()) == (wanted.dtype, wanted.stride())
        assert not own[index].numel() or not torch.equal(found[index], own[index])


def test_a_worker_uses_its_block_again_and_other_threads_take_their_own() -> None:
    weight = torch.zeros(6, 4, dtype=torch.bfloat16)
    seen: list[tuple[int, bool]] = []

    def run(_: int) -> None:
        first, second = scratch_memory.block_for(weight, 6), scratch_memory.block_for(weight, 3)
        seen.append((second.shape[0], first.data_ptr() == second.data_ptr()))

    for_each(run, range(4))
    assert seen == [(3, True)] * 4
    first, second = scratch_memory.block_for(weight, 6), scratch_memory.block_for(weight, 6)
    assert first.data_ptr() != second.data_ptr()
    assert first.dtype is torch.float32
