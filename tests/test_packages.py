"""A feature that needs another package says which, and how to get it, before it does anything."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.models import build
from tests.random_adapters import saved
from veneer.errors import BaseModelError, UnsupportedError
from veneer.packages import require

ROOT = Path(__file__).parent.parent


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else real(name, *rest))


def test_all_that_is_missing_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "pywt", "sklearn")
    with pytest.raises(UnsupportedError, match=r"A thing needs PyWavelets and scikit-learn, which are not") as caught:
        require("A thing", "PyWavelets", "safetensors", "scikit-learn", extra="some")
    assert "pip install PyWavelets scikit-learn (or, in a clone of Veneer: pip install '.[some]')" in str(caught.value)


@pytest.mark.parametrize("missing", ["accelerate", "gguf"])
def test_a_gguf_base(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adapter, base = saved(tmp_path / "adapter"), tmp_path / "base"
    base.mkdir()
    (base / "model.gguf").write_bytes(b"GGUF")
    without(monkeypatch, missing)
    with pytest.raises(BaseModelError, match=rf"A base in a GGUF file needs {missing}, .*pip install {missing} "):
        veneer.load(adapter, base=base, gguf_file="model.gguf")


def test_a_device_map(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base: Any = build("llama")
    base.save_pretrained(tmp_path)
    without(monkeypatch, "accelerate")
    with pytest.raises(BaseModelError, match=r"device_map= needs accelerate"):
        veneer.load(tmp_path, device_map="cpu")


def test_the_extras_exist() -> None:
    """Each extra that a hint or a page names is one of this project's, and is never taken for a package on an index."""
    extras = set(metadata("veneer").get_all("Provides-Extra") or ())
    pages = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    named = {
        extra for text in texts for extra in re.findall(r"(?<!ConfigDict\()extra=\"([\w-]+)\"|'\.\[([\w-]+)\]'", text)
    }
    assert {one or other for one, other in named} - {""} <= extras
    assert not [text for text in texts if re.search(r"install [\"']?veneer", text)]
