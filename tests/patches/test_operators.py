"""Matrices in a form that is cheaper than a matrix: applied, by rows and whole they are the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.methods.shared.wavelets import between, low_pass
from veneer.patches.operators import Circulant, HadamardLowRank, Kronecker, LinearOperator, Sparse


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _sparse(rows: int, columns: int) -> Sparse:
    places = torch.randint(0, rows * columns, (20,), generator=torch.Generator().manual_seed(0)).int()
    places[1] = places[0]
    return Sparse(_random(20), places // columns, places % columns, (rows, columns))


def _wavelet(family: str) -> LinearOperator:
    pytest.importorskip("pywt")
    taken = len(low_pass(family)) - 2
    return between(_sparse(12, 18), (taken // 2, taken - taken // 2) * 2, family)


MATRICES = {
    "Kronecker": lambda: Kronecker(_random(3, 2), _random(4, 9)),
    "circulant": lambda: Circulant(_random(2, 3, 6)),
    "circulant, odd": lambda: Circulant(_random(4, 6, 3)),
    "sparse": lambda: _sparse(12, 18),
    "scaled by entries": lambda: HadamardLowRank(_random(12, 18), _random(12, 3), _random(3, 18)),
    "wavelet of two taps": lambda: _wavelet("db1"),
    "wavelet of eight taps": lambda: _wavelet("db4"),
}


@pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)
@pytest.mark.parametrize("rows", [(), (1,), (2, 5)])
def test_applied_as_whole(make: object, rows: tuple[int, ...]) -> None:
    matrix = make()  # type: ignore[operator]
    whole, x = matrix.dense(), _random(*rows, 18)
    assert matrix.changes()
    assert whole.shape == (12, 18)
    with torch.no_grad():
        assert torch.allclose(matrix.apply(x), x @ whole.T, atol=1e-5)
        assert torch.allclose(matrix.scaled(-2.0).apply(x), x @ whole.T * -2, atol=1e-5)
        wide = matrix.apply(x.bfloat16())
    assert wide.dtype is torch.float32
    assert torch.allclose(wide, x.bfloat16().float() @ whole.T, atol=1e-5)
    assert torch.equal(matrix.rows(3, 7), matrix.dense()[3:7])


@pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)
def test_the_gradient_is_that_of_the_whole(make: object) -> None:
    matrix = make()  # type: ignore[operator]
    x = _random(4, 18).requires_grad_()
    [found] = torch.autograd.grad(matrix.apply(x).square().sum(), x)
    [expected] = torch.autograd.grad((x @ matrix.dense().T).square().sum(), x)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_a_place_outside_is_refused() -> None:
    outside = Sparse(torch.ones(1), torch.tensor([3], dtype=torch.int32), torch.tensor([0], dtype=torch.int32), (3, 4))
    with torch.no_grad(), pytest.raises((RuntimeError, IndexError)):
        outside.apply(torch.ones(1, 4))
