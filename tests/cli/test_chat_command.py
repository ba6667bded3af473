"""``veneer chat``: a conversation through a pipe and on a terminal, its commands, and bad input in one line."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders

import veneer
from veneer.cli import slash_commands, text_generator

Run = Callable[..., Any]
SHORT = ("--max-new-tokens", "4")
STEER = "\x1b]0;owned\x07"


@pytest.fixture
def say(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the command with these lines on standard input."""

    def call(lines: str, *arguments: str | Path) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return run("chat", *arguments, *SHORT)

    return call


@pytest.fixture
def typed(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the command on a terminal, on which these lines are typed; ``KeyboardInterrupt`` stands for Ctrl-C."""

    def call(lines: list[Any], *arguments: str | Path) -> Any:
        coming: Iterator[Any] = iter(lines)

        def typed_line(prompt: str) -> str:
            print(prompt, end="")
            line = next(coming, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", typed_line)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        return run("chat", *arguments, *SHORT)

    return call


def lines(*texts: str) -> str:
    return "".join(f"{text}\n" for text in texts)


def answer(path: Path, prompt: str, *names: str) -> str:
    """The answer of the library itself."""
    model = veneer.load(path)
    tokenizer = veneer.load_tokenizer(model)
    tokens = tokenizer(prompt, return_tensors="pt")
    with model.using(names):
        ids = model.generate(**tokens, max_new_tokens=4, do_sample=False)
    return str(tokenizer.decode(ids[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))


def messages(file: Path) -> list[Any]:
    [line] = file.read_text(encoding="utf-8").splitlines()
    return list(json.loads(line)["messages"])


def test_each_line_is_a_message_and_the_answers_are_remembered(say: Run, made: Path, tmp_path: Path) -> None:
    result = say(lines("w5 w6", "", "w9", f"/save {tmp_path / 'talk.jsonl'}"), made / "adapter")
    first = answer(made / "adapter", "w5 w6", "default")
    second = answer(made / "adapter", f"w5 w6\n{first}\nw9", "default")
    assert (result.code, result.err, result.out) == (0, "", lines(first, second))
    assert [m["content"] for m in messages(tmp_path / "talk.jsonl")] == ["w5 w6", first, "w9", second]
    assert [m["role"] for m in messages(tmp_path / "talk.jsonl")] == ["user", "assistant"] * 2


def test_the_chat_template_and_the_system_message(say: Run, chat: Path, made: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    told = say(lines("w6", "/reset", "/system w9", "w6", f"/save {file}", "/reset", "/system", "w6"), chat)
    first, second, third = told.out.splitlines()
    assert first == third == answer(made / "adapter", "w6 w7", "default")
    assert second == answer(made / "adapter", "w9 w6 w7", "default") != first
    assert messages(file)[0] == {"role": "system", "content": "w9"}
    assert say("w6\n", chat, "--system", "w9").out == lines(second)
    assert say("w6\n", chat, "--no-chat").out == lines(answer(made / "adapter", "w6", "default"))


def test_adapters_switch(say: Run, made: Path) -> None:
    switches = ("/adapter other", "/base", "/adapter default other", "/adapter default")
    result = say(lines("w5 w6", *(f"{switch}\n/reset\nw5 w6" for switch in switches)), made / "set")
    names = (["default"], ["other"], [], ["default", "other"], ["default"])
    assert result.out.splitlines() == [answer(made / "set", "w5 w6", *each) for each in names]
    assert len(set(result.out.splitlines())) >= 3


def test_several_paths(say: Run, made: Path) -> None:
    paths = (made / "base", made / "adapter", made / "set" / "other", made / "set")
    result = say(lines("/adapter", "w5 w6", "/adapter other", "/reset", "w5 w6"), *paths)
    listed, (first, second) = result.out.splitlines()[:-2], result.out.splitlines()[-2:]
    assert listed == ["* adapter  LORA", "  other  LORA", "  set  LORA", "  other-2  LORA", "  base"]
    assert first == answer(made / "set", "w5 w6", "default")
    assert second == answer(made / "set", "w5 w6", "other")


def test_load(say: Run, made: Path, tmp_path: Path) -> None:
    other = shutil.copytree(made / "set" / "other", tmp_path / "with space")
    result = say(
        lines(f"/load '{other}' second", "/adapter", "w5 w6", f"/load {made / 'set'}", "/adapter"), made / "base"
    )
    assert result.out.splitlines()[:2] == ["* second  LORA", "  base"]
    assert result.out.splitlines()[2] == answer(made / "set", "w5 w6", "other")
    assert result.out.splitlines()[3:] == ["  second  LORA", "* set  LORA", "  other  LORA", "  base"]


def test_compare(say: Run, made: Path, tmp_path: Path) -> None:
    alone = {
        name: answer(made / "set", "w5 w6", *names)
        for name, names in (("default", ["default"]), ("other", ["other"]), ("base", []))
    }
    last = say(lines("w5 w6", "/compare other base"), made / "set").out
    assert last.startswith(alone["default"])
    assert columns(last) == {"other": alone["other"], "base": alone["base"]}
    file = tmp_path / "talk.jsonl"
    for words in ("", " all"):
        following = say(lines(f"/compare{words}", "w5 w6", f"/save {file}"), made / "set").out
        assert columns(following) == alone
        assert messages(file)[1]["content"] == alone["default"]
        file.unlink()


def columns(shown: str) -> dict[str, str]:
    """Name -> answer in a table of short answers."""
    rows = [line.replace("┃", "│").split("│")[1:-1] for line in shown.splitlines() if line[:1] in ("┃", "│")]
    names, *parts = ([cell.strip() for cell in row] for row in rows)
    return {name: "".join(column) for name, *column in zip(names, *parts, strict=True)}


def test_a_message_that_begins_with_a_slash(say: Run, made: Path) -> None:
    assert say("//w5 w6\n", made / "adapter").out == lines(answer(made / "adapter", "/w5 w6", "default"))


def test_a_stop_string_and_a_seed(say: Run, made: Path) -> None:
    whole = answer(made / "adapter", "w5 w6", "default")
    word = "w" + whole.split("w")[3]
    assert say("w5 w6\n", made / "adapter", "--stop", word).out == lines(whole.partition(word)[0])
    sampled = [say("w5\nw6\n", made / "adapter", "--temperature", "2", "--seed", "1").out for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_on_a_terminal(typed: Run, made: Path) -> None:
    result = typed(["/nothing", "/adapter nobody", KeyboardInterrupt, "/base", "w5 w6", "/quit", "never"], made / "set")
    assert result.code == 0
    greeting, *errors = result.err.splitlines()
    assert greeting.startswith("default: ask, or /help.")
    assert [error.partition(".")[0] for error in errors] == [
        "error: There is no command /nothing",
        "error: There is no adapter 'nobody' on this model: Adapter nobody does not exist",
    ]
    assert f"base> {answer(made / 'set', 'w5 w6')}\n" in result.out
    assert "never" not in result.out


def test_an_answer_that_is_stopped(
    typed: Run, run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settled(text: str, stops: list[str]) -> str:
        if text.count("w") > 2:
            raise KeyboardInterrupt
        return text

    folder, file = shutil.copytree(made / "base", tmp_path / "base"), tmp_path / "talk.jsonl"
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "decoder": None}))  # spaces between the words
    whole = answer(folder, "w5 w6")
    monkeypatch.setattr(text_generator, "settled", settled)
    result = typed(["w5 w6", f"/save {file}", "/quit"], folder)
    assert (result.code, result.err.count("\n")) == (0, 1)
    kept = messages(file)[1]["content"]
    assert whole.startswith(kept)
    assert 0 < len(kept) < len(whole)
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6\nw5 w6\n"))
    assert run("chat", folder, *SHORT).code == 130


def test_help_and_completion(say: Run, made: Path) -> None:
    shown = say("/help\n", made / "adapter").out
    assert all(f"/{name}" in shown for name in slash_commands.COMMANDS)

    complete: Any = slash_commands.completions
    session = SimpleNamespace(adapters=["pirate", "json"])
    assert complete(session, "/sa") == ["/save "]
    assert complete(session, "pi") == ["pirate "]
    assert complete(session, "") == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/adaptr x", "Did you mean /adapter?"),
        ("/adapter othr", "Did you mean 'other'?"),
        ("/adapter other base", "The base answers alone"),
        ("/base now", "/base takes nothing more"),
        ("/compare other", "There is nothing to compare"),
        ("/compare other other", "There is nothing to compare"),
        ("/compare other nobody", "no adapter 'nobody'"),
        ("/load", "/load takes PATH [NAME]"),
        ("/load nowhere/at/all", "does not exist"),
        ("/load {made}/base", "is a full model, not an adapter"),
        ("/load {made}/set name", "is a set"),
        ("/load {made}/adapter a.b", "a.b"),
        ("/load 'unfinished", "Close the quotes"),
        ("/save {made}/talk.jsonl", "There is nothing to save"),
        ("w5\n/save {made}/base/config.json", "is there already"),
        ("w5\n/save {made}/base/config.json/x", "cannot be written"),
        ("/system w5", "--system needs a chat template"),
        ("w5 " * 70, "has grown to 70 tokens, and the model reads 64"),
    ],
)
def test_bad_lines(say: Run, typed: Run, made: Path, line: str, words: str) -> None:
    text = line.format(made=made)
    result = say(lines(text, "w5"), made / "set")
    assert result.code == 2
    [told] = result.err.splitlines()
    assert told.startswith("error: ")
    assert words in told
    on_terminal = typed([*text.split("\n"), "w5"], made / "set")
    assert on_terminal.code == 0
    assert told in on_terminal.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "PATH"),
        (["nowhere/at/all"], "does not exist"),
        (["{made}/adapter", "--stop", ""], "--stop is an empty string"),
        (["{made}/adapter", "--top-k", "3", "--temperature", "0"], "Leave out one of them"),
        (["{made}/adapter", "--system", "w5"], "--system needs a chat template"),
        (["{made}/adapter", "{made}/base"], "is a full model, not an adapter"),
        (["{made}/adapter", "--base", "{made}/adapter"], "is an adapter, not a base"),
        (["{made}/adapter", "--device", "gpu"], "cannot be used"),
    ],
)
def test_bad_arguments(say: Run, made: Path, arguments: list[str], words: str) -> None:
    result = say("w5\n", *(argument.format(made=made) for argument in arguments))
    assert (result.code, result.out) == (2, "")
    [told] = result.err.splitlines()
    assert words in told


def test_nothing_steers_the_terminal(typed: Run, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "set", tmp_path / "own")
    for path in (made / "base").glob("tokenizer*"):
        shutil.copy(path, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.decoder = decoders.Replace("w", STEER)
    tokenizer.save(str(folder / "tokenizer.json"))
    other = shutil.move(folder / "other", folder / "oth\x1b[31mer")
    result = typed(["w5 w6", "/adapter", "/compare default base", f"/adapter {other.name}", "w5"], folder)
    assert result.code == 0
    assert r"\x1b]0;owned\x07" in result.out
    assert r"oth\x1b[31mer" in result.out
    assert "owned\x07" not in result.out
    assert "\x1b[31m" not in result.out
    assert "\x1b]0" not in result.out


def test_lines_that_are_no_text(made: Path) -> None:
    command = [sys.executable, "-m", "veneer", "chat", str(made / "adapter")]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    result = subprocess.run(command, input=b"\xff\xfe", capture_output=True, check=False, env=environment)
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.splitlines()[-1].startswith(b"error: Standard input is no text")
