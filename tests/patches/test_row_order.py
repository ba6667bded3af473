"""Rows sorted by adapter: each has one place or is by itself, and long ones do not lengthen all others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.patches import mixed_batch
from veneer.patches.mixed_batch import StackedFactors
from veneer.patches.row_order import row_order

CPU = torch.device("cpu")
SIZES = st.lists(st.integers(0, 6) | st.integers(7, 40), min_size=1, max_size=9)


def spans(sizes: list[int], cuts: st.DataObject) -> tuple[list[list[range]], int]:
    """Lay the rows of each adapter somewhere, in one span or two, among rows of none."""
    pieces = [(number, size) for number, size in enumerate(sizes) if size]
    halves = [part for number, size in pieces for part in ((number, size // 2), (number, size - size // 2)) if part[1]]
    groups: list[list[range]] = [[] for _ in sizes]
    start = 0
    for number, size in cuts.draw(st.permutations(halves)):
        start += cuts.draw(st.integers(0, 2))
        groups[number].append(range(start, start + size))
        start += size
    return groups, start + cuts.draw(st.integers(0, 2))


@given(SIZES, st.data())
def test_each_row_gets_the_product_of_its_own_adapter(sizes: list[int], data: st.DataObject) -> None:
    groups, length = spans(sizes, data)
    if not length or not any(sizes):
        return
    generator = torch.Generator().manual_seed(len(sizes))
    x, y = (torch.randn(length, width, generator=generator) for width in (5, 4))
    down, up = torch.randn(len(sizes), 5, 2, generator=generator), torch.randn(len(sizes), 2, 4, generator=generator)
    expected = y.clone()
    for number, own in enumerate(groups):
        for row in (row for span in own for row in span):
            expected[row] += x[row] @ down[number] @ up[number]
    order = row_order(groups, length, CPU)
    names = tuple(map(str, range(len(sizes))))
    result = StackedFactors(names, names, down, up).added(y.clone(), x, order)
    assert torch.allclose(result, expected, atol=1e-4)


@given(SIZES, st.data())
def test_padding_makes_no_more_than_twice_as_many_rows(sizes: list[int], data: st.DataObject) -> None:
    order = row_order(*spans(sizes, data), CPU)
    if order.rows is None:
        return
    assert len(order.rows) == sum(sizes)
    for block in order.blocks:
        rows = len(block.take) if block.keep is None else len(block.keep)
        assert rows <= len(block.take) <= 2 * rows


def test_prompts_do_not_take_the_others_out_of_their_product() -> None:
    groups = [[range(place, place + 1)] for place in range(61)] + [[range(61, 78)], [range(78, 90)], [range(90, 107)]]
    order = row_order(groups, 107, CPU)
    assert [block.adapters for block in order.blocks] == [None, (61, 63, 62)]
    assert [len(block.take) for block in order.blocks] == [64, 51]


@given(SIZES, st.data())
def test_large_factors_are_not_put_together(sizes: list[int], data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mixed_batch, "_GATHERED", 0)
        test_each_row_gets_the_product_of_its_own_adapter.hypothesis.inner_test(sizes, data)
