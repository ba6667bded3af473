"""What a checkpoint holds cannot steer the terminal on which a command shows it."""

from __future__ import annotations

import io
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders

import veneer
from tests.models import VOCAB
from tests.random_adapters import CONFIG, edit_config
from veneer.cli import terminal
from veneer.printing import panel, printable_prose

Run = Callable[..., Any]
STEER = "\x1b]0;owned\x07\x1b[31m"
SPELT_OUT = r"\x1b]0;owned\x07\x1b[31m"
SHORT = ("--prompt", "w5 w6", "--max-new-tokens", "3")


def with_tokenizer(made: Path, tmp_path: Path, change: Callable[[Path], Any]) -> Path:
    """An adapter with a tokenizer of its own, changed."""
    folder = shutil.copytree(made / "adapter", tmp_path / "own")
    for path in (made / "base").glob("tokenizer*"):
        shutil.copy(path, folder)
    change(folder)
    return folder


def decoded_with(decoder: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.decoder = decoder
        tokenizer.save(str(folder / "tokenizer.json"))

    return change


@pytest.mark.filterwarnings("default")
def test_an_unknown_key_is_a_line_of_ours(run: Run, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "adapter", tmp_path / "odd")
    edit_config(folder, **{STEER: "[bold]3"})
    result = run("inspect", folder)
    assert result.code == 0
    said = f"warning: Unexpected keyword arguments ['{SPELT_OUT}'] for class LoraConfig, these are ignored. "
    assert result.err == f"{said}{folder}/{CONFIG}: {SPELT_OUT}='[bold]3' stays in the config for other tools.\n"
    assert "\x1b" not in result.out
    [line] = run("generate", folder, *SHORT).err.splitlines()
    assert line.startswith(said)


def test_a_warning_of_the_library_says_nothing_of_its_source(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "adapter", tmp_path / "odd")
    edit_config(folder, **{STEER: 3})
    with pytest.warns(UserWarning, match="Unexpected keyword") as caught:
        veneer.PeftConfig.from_pretrained(folder)
    assert str(caught[0].message).isprintable()


def test_an_answer_on_a_terminal(run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    folder = with_tokenizer(made, tmp_path, decoded_with(decoders.Replace("w", STEER)))
    result = run("generate", folder, *SHORT)
    assert (result.code, result.out.count(SPELT_OUT), "\x1b" in result.out) == (0, 3, False)


def test_an_answer_that_a_program_reads(run: Run, made: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(made, tmp_path, decoded_with(decoders.Replace("w", STEER)))
    assert run("generate", folder, *SHORT).out.count(SPELT_OUT) == 3
    assert json.loads(run("generate", folder, *SHORT, "--json").out)["answer"].count(STEER) == 3


@pytest.mark.parametrize(
    "text", ["two\nlines\twide", "a\u00a0b\u202fc\u3000d", "👩\u200d🚀", "\u0645\u06cc\u200c\u062e", "naïve 字 🙂"]
)
def test_what_writing_needs_stays(text: str) -> None:
    assert printable_prose(text) == text


@pytest.mark.parametrize("text", [STEER, "\r", "\x9b31m", "\u202e", "\ud800", "\u2028", "\x7f"])
def test_what_steers_does_not(text: str) -> None:
    assert printable_prose(f"a{text}b") == "a" + text.encode("unicode_escape").decode() + "b"


def test_a_panel_takes_nothing_for_markup() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    console.print(panel("report", [("[bold]name[/]", "[red]x[/red] :smile: \\"), (STEER, STEER)], [f"[link=x]{STEER}"]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for text in ("[bold]name[/]", "[red]x[/red] :smile: \\", SPELT_OUT, "[link=x]"):
        assert text in shown
    assert "\x1b]" not in shown


def test_progress_takes_nothing_for_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=shown, force_terminal=True, width=100))
    with terminal.progress("first") as step:
        step(f"comparing [/] [red]x {STEER}")
    assert f"comparing [/] [red]x {SPELT_OUT}" in shown.getvalue()


def test_an_error_is_printable_in_a_traceback_too() -> None:
    error = veneer.BindError(STEER, problems=[STEER], hint=STEER)
    for text in (error.message, error.hint, str(error), *error.problems):
        assert str(text).isprintable()


def test_warnings_of_python_are_lines_of_ours(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(*_: Any, **__: Any) -> str:
        warnings.warn(f"odd\n{STEER}", stacklevel=1)
        return "sha256:0"

    monkeypatch.setattr("veneer.files.base_digest.base_digest", digest)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("digest", "x").err == f"warning: odd {SPELT_OUT}\n"


# -- templates and tokenizers --------------------------------------------------------------------------------

TEMPLATES = [
    "{{ 1 // 0 }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ 'a' + 1 }}",
    "{{ 'a' * 10**14 }}",
    "{% for i in range(10**12) %}x{% endfor %}",
    "{% include 'x' %}",
    "{{ strftime_now(5) }}",
    "{{ raise_exception('" + "no " * 3 + "') }}",
    "{{",
    "{% if false %}x{% endif %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_that_fails(run: Run, chat: Path, template: str) -> None:
    (chat / "chat_template.jinja").write_text(template)
    result = run("generate", chat, *SHORT)
    assert (result.code, result.out) == (2, "")
    [line] = result.err.splitlines()
    assert line.startswith("error: The tokenizer's chat template ")
    assert line.endswith("--no-chat leaves it out.")
    assert run("generate", chat, *SHORT, "--no-chat").code == 0


def test_a_chat_template_cannot_steer_in_its_error(run: Run, chat: Path) -> None:
    (chat / "chat_template.jinja").write_text("{{ raise_exception('" + STEER + "') }}")
    assert SPELT_OUT in run("generate", chat, *SHORT).err


def test_tokens_that_the_model_does_not_know(run: Run, made: Path, tmp_path: Path) -> None:
    def add(folder: Path) -> None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_tokens([f"more{index}" for index in range(3)])
        tokenizer.save(str(folder / "tokenizer.json"))

    folder = with_tokenizer(made, tmp_path, add)
    result = run("generate", folder, "--prompt", "w5 more2", "--max-new-tokens", "3")
    assert (result.code, result.out) == (2, "")
    assert f"gives the token {VOCAB + 2}, and the model knows {VOCAB}" in result.err


def test_a_generation_config_that_transformers_refuses(run: Run, made: Path, tmp_path: Path) -> None:
    base = shutil.copytree(made / "base", tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"num_beams": 2, "num_return_sequences": 3}))
    result = run("generate", made / "adapter", "--base", base, *SHORT)
    assert (result.code, result.out) == (2, "")
    assert len(result.err.splitlines()) == 1
