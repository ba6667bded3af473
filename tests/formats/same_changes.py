"""Compares the changes of weights that two adapters mean."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_same(
    changes: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    """Check that the changes are those of the same modules, and equal up to rounding."""
    assert changes.keys() == expected.keys()
    for name, change in changes.items():
        torch.testing.assert_close(change, expected[name].to(change.dtype), rtol=rtol, atol=atol)
