"""Folders that the commands work on, and a way to run a command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import veneer
from tests.models import VOCAB
from tests.random_adapters import config, enlarge, saved_base
from veneer.cli import main

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w7{% endif %}"


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command in this process."""

    def call(*arguments: str | Path) -> Result:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base/`` with a tokenizer, ``adapter/`` of it, and ``set/`` with two adapters."""
    root = tmp_path_factory.mktemp("cli")
    base = saved_base(root / "base")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w2")
    tokenizer.save_pretrained(base)
    model = veneer.load(base)
    model.add_adapter("default", config(), seed=1)
    enlarge(model, "default", 1)
    model.save_pretrained(root / "adapter")
    model.add_adapter("other", config(r=2), seed=2)
    enlarge(model, "other", 2)
    model.save_pretrained(root / "set")
    return root


@pytest.fixture
def chat(made: Path, tmp_path: Path) -> Path:
    """An adapter with a tokenizer of its own that has a chat template."""
    folder = shutil.copytree(made / "adapter", tmp_path / "chat")
    for path in (made / "base").glob("tokenizer*"):
        shutil.copy(path, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
