"""The environment of these tests: Veneer is what ``import peft`` means in it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.clients import conftest


@pytest.mark.skipif(conftest.RECORDING, reason="peft is what is recorded")
def test_peft_is_not_installed() -> None:
    done = subprocess.run([sys.executable, "-c", "import peft"], capture_output=True, text=True, check=False)
    assert "No module named 'peft'" in done.stderr


def test_the_clients_find_it(as_recorded: Callable[[Any], None]) -> None:
    import accelerate.utils
    import peft
    from transformers.utils import is_peft_available

    as_recorded({"version": peft.__version__, "found": [is_peft_available(), accelerate.utils.is_peft_available()]})
