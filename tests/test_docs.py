"""The documentation is true: its Python runs, its commands run, its links lead somewhere.

The blocks of a page run in order, in one namespace, in a folder that holds what the pages speak of: ``base/`` (a
tiny Llama with a tokenizer), LoRA adapters for it below ``adapters/``, ``set/``, two of them saved together, and
``oft/``, one of another method.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benching.conftest import no_processes
from tests.models import VOCAB, build
from veneer.benching.measure.fresh_process import Request

__all__ = ["no_processes"]

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(?P<kind>[^`\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def blocks(page: Path, kind: str) -> list[str]:
    return [found["text"] for found in BLOCK.finditer(page.read_text()) if found["kind"] == kind]


def title(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the examples run in; each gets a copy."""
    import veneer

    root = tmp_path_factory.mktemp("docs")
    build("llama").save_pretrained(root / "base")
    save_tokenizer(root / "base")
    model = veneer.load(root / "base")
    for seed, name in enumerate(("pirate", "json")):
        torch.manual_seed(seed)
        config = veneer.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        model.add_adapter(name, config)
    model.save_pretrained(root / "adapters")
    shutil.copytree(root / "adapters", root / "set")
    turned = veneer.OFTConfig(oft_block_size=8, target_modules=["q_proj", "v_proj"], init_weights=False)
    veneer.get_peft_model(veneer.load(root / "base").get_base_model(), turned, seed=1).save_pretrained(root / "oft")
    return root


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCAB - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    chat = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat, **ends).save_pretrained(folder)


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "docs"
    shutil.copytree(world, place)
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=title)
def test_python_runs(page: Path, here: Path, no_processes: list[Request]) -> None:
    namespace: dict[str, Any] = {"__name__": "docs"}
    for text in blocks(page, "python"):
        exec(compile(text, f"{title(page)}: {text.splitlines()[0]}", "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "console")], ids=title)
def test_commands_run(page: Path, here: Path, no_processes: list[Request], capfd: pytest.CaptureFixture[str]) -> None:
    """Every ``$ veneer ...`` succeeds, or fails as its page says with ``# exit 2``; bench starts no processes."""
    from veneer.cli import main

    for line in "\n".join(blocks(page, "console")).splitlines():
        if line.startswith("$ veneer "):
            command, _, code = line.removeprefix("$ veneer ").partition("# exit ")
            assert main(shlex.split(command)) == int(code or 0), f"{line}\n{capfd.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_somewhere(page: Path) -> None:
    broken = [link for link in LINK.findall(page.read_text()) if not leads_somewhere(page, link)]
    assert not broken, f"{title(page)} links to what is not there: {broken}"


def leads_somewhere(page: Path, link: str) -> bool:
    if "://" in link or link.startswith("mailto:"):
        return True
    path, _, anchor = link.partition("#")
    target = (page.parent / path) if path else page
    return target.exists() and (not anchor or anchor in anchors(target))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are commonly made: lower case, words joined by hyphens."""
    headings = HEADING.findall(page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_page_of_methods_is_current() -> None:
    from tests.methods import document

    assert document.PAGE.read_text(encoding="utf-8") == document.page(), "run `make methods` and commit the page"


def test_the_checks_of_methods_are_recorded() -> None:
    """The table of checks speaks of the methods and cases that there are now."""
    from collections import Counter

    from tests.methods.case import cases
    from tests.methods.checks import recorded
    from tests.methods.document import count

    now = Counter(name.upper() for kind in ("case", "prompt") for name, _ in cases(kind))
    assert {name: count(own) for name, own in recorded().items()} == now, "run `make checks ARGS=method` and commit"
    assert not [name for name, own in recorded().items() if any("failed" in found for found in own.values())]
