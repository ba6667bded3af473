"""Folders to measure: tiny bases with two adapters each; and what a fresh process would say of loading."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.cli.conftest import run
from tests.random_adapters import saved, saved_base
from veneer.benching.measure.fresh_process import Request

__all__ = ["run"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture -> a folder with ``base``, ``a`` and ``b``, made when it is first asked for."""
    root = tmp_path_factory.mktemp("benching")

    def made(arch: str) -> Path:
        place = root / arch
        if not place.exists():
            saved_base(place / "base", arch)
            for seed, name in enumerate(("a", "b"), 1):
                saved(place / name, arch, seed)
        return place

    return made


# One token for each role, one for each word, and one at the end of a message.
TEMPLATE = (
    "{% for m in messages %}{{ 'w90 ' if m.role == 'user' else 'w91 ' }}{{ m.content }} w2 {% endfor %}"
    "{% if add_generation_prompt %}w91 {% endif %}"
)


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Tokenizer of the words ``w0`` to ``w98``, each a token of that number."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    template = TEMPLATE if chat else None
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", chat_template=template)


@pytest.fixture
def talking(folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder with ``base``, which has a tokenizer, ``a`` and ``b``."""
    place = shutil.copytree(folder("llama"), tmp_path / "talking")
    tokenizer().save_pretrained(place / "base")
    return place


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Let no fresh process start; the requests for them are kept."""
    asked: list[Request] = []

    def answer(request: Request) -> dict[str, float]:
        asked.append(request)
        found = {"import": 1.0, "load": 0.2, "peak": 4e8, "serving": 4e8}
        return found | ({"attach": 0.01} if request.variant == "unmerged" else {})

    monkeypatch.setattr("veneer.benching.run.in_fresh_process", answer)
    return asked
