"""Products with float32 factors in halves of bfloat16: on a CPU, with matrix units emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer.base_model.sites.linear import LinearSite
from veneer.patches import products, seeded_dropout
from veneer.patches.patch import Patch, apply
from veneer.patches.products import Exact, Split

ROWS, IN, OUT, RANK = 64, 48, 80, 8
# Of float32 arithmetic, in norms; of a factor rounded to bfloat16 it would be 2e-3.
CLOSE, ROUNDED = 2e-5, 1e-3


@pytest.fixture
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, ...]]:
    """Give the CPU products of bfloat16 in float32; the dtypes of their factors are noted."""
    seen: list[tuple[torch.dtype, ...]] = []

    def wide_product(left: Tensor, right: Tensor) -> Tensor:
        seen.append((left.dtype, right.dtype))
        return left.float() @ right.float()

    monkeypatch.setattr(products, "_wide_product", wide_product)
    monkeypatch.setattr(products, "_has_wide_products", lambda device: True)
    monkeypatch.setattr(seeded_dropout, "CPU_VALUES", 20 * IN)  # several parts
    return seen


def far(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def step(share: float, hooked: bool, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """Return the output, and the gradients of all, for a bfloat16 layer with a float32 adapter."""
    generator = torch.Generator().manual_seed(5)
    linear = nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.copy_(torch.randn(OUT, IN, generator=generator))
    if hooked:
        linear.register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(ROWS, IN, generator=generator).bfloat16().requires_grad_()
    up, down = up.clone().requires_grad_(), down.clone().requires_grad_()
    torch.manual_seed(7)
    y = apply(LinearSite("layer", linear), None, linear, [Patch(up, down, 0.5, share)], True, x)
    y.backward(torch.randn(ROWS, OUT, generator=generator).bfloat16())
    return {
        "y": y.detach(),
        **{name: t.grad for name, t in (("x", x), ("up", up), ("down", down)) if t.grad is not None},
    }


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_step_in_halves_is_float32s(share: float, hooked: bool, matrix_units: Any, monkeypatch: Any) -> None:
    torch.manual_seed(1)
    up, down = torch.randn(OUT, RANK), torch.randn(RANK, IN)
    split = step(share, hooked, up, down)
    assert len(matrix_units) > 3
    assert {dtype for pair in matrix_units for dtype in pair} == {torch.bfloat16}
    monkeypatch.setattr(products, "products", lambda x, dtype: Exact(dtype))
    monkeypatch.setattr("veneer.patches.low_rank_autograd.products", lambda x, dtype: Exact(dtype))
    exact, seen = step(share, hooked, up, down), len(matrix_units)
    assert len(matrix_units) == seen
    assert set(split) == {"y", "x", "up", "down"}
    assert far(split["up"], exact["up"]) < CLOSE
    assert far(split["down"], exact["down"]) < CLOSE
    # Of the same bfloat16 numbers, all but a few are the same.
    for name in ("y", "x"):
        assert split[name].dtype is torch.bfloat16
        assert (split[name] != exact[name]).float().mean() < 0.01
    rounded = step(share, hooked, up.bfloat16().float(), down.bfloat16().float())
    assert far(rounded["up"], exact["up"]) > ROUNDED  # the distance tells halves from rounding


def test_a_gradient_that_is_differentiated_again_is_exact(matrix_units: Any) -> None:
    torch.manual_seed(2)
    linear = nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    up, down = torch.randn(OUT, RANK, requires_grad=True), torch.randn(RANK, IN, requires_grad=True)
    x = torch.randn(ROWS, IN).bfloat16()
    y = apply(LinearSite("layer", linear), None, linear, [Patch(up, down, 0.5)], True, x)
    (first,) = torch.autograd.grad(y.float().square().sum(), [down], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), [up])
    assert second.norm() > 0


def test_it_is_taken_on_devices_with_matrix_units_alone() -> None:
    x = torch.zeros(2, 2, dtype=torch.bfloat16)
    assert products.products(x, torch.float32) == Exact(torch.float32)
    assert not products._has_wide_products(torch.device("cpu"))


@pytest.mark.parametrize(("x", "dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_one_dtype_needs_no_halves(x: torch.dtype, dtype: torch.dtype, matrix_units: Any) -> None:
    assert products.products(torch.zeros(2, 2, dtype=x), dtype) == Exact(dtype)
    assert products.products(torch.zeros(2, 2, dtype=torch.bfloat16), torch.float32) == Split()
