"""Joining layers to one and parting them again: each row changes by what it changed by before."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from veneer.formats.canonical import ModuleChange
from veneer.formats.fused_layers import joined, parted, swapped

COLUMNS = 5


def dense(change: ModuleChange) -> Tensor:
    leaves = {leaf: tensor.double() for leaf, tensor in change.leaves.items()}
    if change.method == "LORA":
        return change.scale * leaves["lora_B.weight"] @ leaves["lora_A.weight"]
    first, second = (leaves[f"hada_w{i}_a"] @ leaves[f"hada_w{i}_b"] for i in (1, 2))
    return change.scale * first * second


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[ModuleChange | None], list[int]]:
    method = draw(st.sampled_from(["LORA", "LOHA"]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    rows = draw(st.lists(st.integers(1, 7), min_size=2, max_size=4))
    shared = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    common = draw(st.integers(1, 3))

    def factor(*shape: int, by_input: bool) -> Tensor:
        if by_input and shared:
            return torch.arange(1.0, 1 + shape[0] * shape[1]).reshape(shape).to(dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    def change(number: int, size: int) -> ModuleChange | None:
        if draw(st.booleans()) and number:
            return None
        rank = common if shared else draw(st.integers(1, 3))
        scale = 1.5 if shared else draw(st.sampled_from([0.0, 0.3, 1.0, 1.5]))
        pairs = {"LORA": [("lora_B.weight", "lora_A.weight")]}.get(
            method, [("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")]
        )
        leaves = {}
        for up, down in pairs:
            leaves[down] = factor(rank, COLUMNS, by_input=True)
            leaves[up] = factor(size, rank, by_input=False)
        return ModuleChange(f"layer{number}", method, leaves, rank, scale)

    return [change(number, size) for number, size in enumerate(rows)], rows


@settings(max_examples=150, deadline=None)
@given(layers())
def test_what_is_joined_and_parted_is_the_same_change(drawn: tuple[list[ModuleChange | None], list[int]]) -> None:
    parts, rows = drawn
    zero = [torch.zeros(size, COLUMNS, dtype=torch.float64) for size in rows]
    expected = [none if part is None else dense(part) for part, none in zip(parts, zero, strict=True)]
    whole = joined("whole", parts, rows)
    assert (dense(whole) - torch.cat(expected)).norm() <= 1e-6 * torch.cat(expected).norm()
    names = [f"layer{number}" for number in range(len(rows))]
    again = {change.path: dense(change) for change in parted(whole, names, rows)}
    for name, change, none in zip(names, expected, zero, strict=True):
        assert (again.get(name, none) - change).norm() <= 1e-6 * torch.cat(expected).norm()


@settings(max_examples=50, deadline=None)
@given(layers())
def test_parts_that_share_their_inputs_stay_one(drawn: tuple[list[ModuleChange | None], list[int]]) -> None:
    parts, rows = drawn
    whole = joined("whole", parts, rows)
    once = parted(whole, [f"layer{number}" for number in range(len(rows))], rows)
    if len(once) == len(rows) and whole.method == "LORA" and len({change.rank for change in once}) == 1:
        again = joined("whole", once, rows)
        assert again.rank == whole.rank
        assert torch.equal(dense(again), dense(whole))


def test_halves_in_the_other_order() -> None:
    change = ModuleChange(
        "x", "LORA", {"lora_A.weight": torch.ones(1, 2), "lora_B.weight": torch.arange(6.0)[:, None]}, 1, 1
    )
    assert swapped(change).leaves["lora_B.weight"].flatten().tolist() == [3, 4, 5, 0, 1, 2]
    assert torch.equal(dense(swapped(swapped(change))), dense(change))
