"""Fixtures that several tests of merging share."""

from __future__ import annotations

from pathlib import Path

import pytest

import veneer
from tests.random_adapters import saved, saved_base


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make ``base/``, ``adapter/`` and ``merged/``, which tests copy."""
    root = tmp_path_factory.mktemp("made")
    saved_base(root / "base")
    saved(root / "adapter")
    veneer.merge(root / "adapter", root / "base", out=root / "merged", reversible=True)
    return root
