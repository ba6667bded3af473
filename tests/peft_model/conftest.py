"""What several tests of compiled models begin with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before the test, and nothing left of it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
