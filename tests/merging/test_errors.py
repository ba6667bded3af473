"""The error of a merge against float64: never above peft's, and in half precision as small as it can be."""

from __future__ import annotations

import pytest

from tests.merging.errors import DTYPES, KINDS, errors

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_not_above_the_peers(kind: str, dtype: str) -> None:
    found = errors(KINDS[kind], DTYPES[dtype])
    assert found.limit > 0
    assert found.veneer <= 1.02 * min(found.peft, found.safe)
    if dtype != "float32":  # in which the order of the sums counts too
        assert found.veneer <= 1.001 * found.limit
