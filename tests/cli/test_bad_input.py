"""Bad input: exit code 2, one line that says what is wrong and how to mend it, and nothing half-written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.random_adapters import CONFIG, WEIGHTS, edit_config, edit_tensors

Run = Callable[..., Any]


def spoiled(made: Path, tmp_path: Path, kind: str) -> Path:
    """A copy of the adapter with one fault."""
    folder = shutil.copytree(made / "adapter", tmp_path / "spoiled")
    weights = folder / WEIGHTS
    faults: dict[str, Callable[[], Any]] = {
        "truncated": lambda: weights.write_bytes(weights.read_bytes()[:-5]),
        "header too long": lambda: weights.write_bytes(b"\xff" * 100),
        "no weights": weights.unlink,
        "no config": (folder / CONFIG).unlink,
        "pickle": lambda: weights.rename(folder / "adapter_model.bin"),
        "empty": lambda: edit_tensors(folder, lambda tensors: {}),
        "bad json": lambda: (folder / CONFIG).write_text("{"),
        "unknown method": lambda: edit_config(folder, peft_type="LORE"),
        "unknown switch": lambda: edit_config(folder, use_sorcery=True),
        "other rank": lambda: edit_config(folder, r=16),
        "other names": lambda: edit_tensors(folder, lambda t: {k.replace("q_proj", "query"): v for k, v in t.items()}),
        "base moved": lambda: edit_config(folder, base_model_name_or_path="/home/trainer/base"),
        "base not named": lambda: edit_config(folder, base_model_name_or_path=None),
        "nan": lambda: edit_tensors(folder, lambda t: {k: v * float("nan") for k, v in t.items()}),
        "empty folder": lambda: [path.unlink() for path in folder.iterdir()],
    }
    faults[kind]()
    return folder


SPOILED = {
    "truncated": "truncated",
    "header too long": "truncated, or no safetensors",
    "no weights": "no weights",
    "no config": "no adapter_config.json",
    "pickle": "veneer convert-pickle",
    "empty": "empty checkpoint",
    "bad json": "no valid JSON at line 1",
    "unknown method": "Did you mean 'LORA'?",
    "unknown switch": "use_sorcery=True",
    "other rank": "want (16, 32)",
    "other names": "nearest: model.layers.0.self_attn.q_proj",
    "base moved": "--base",
    "base not named": "names no base model",
    "nan": "NaN or infinite values",
    "empty folder": "neither a model",
}


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.parametrize("command", ["generate", "merge"])
def test_a_spoiled_adapter(run: Run, made: Path, tmp_path: Path, kind: str, command: str) -> None:
    folder = spoiled(made, tmp_path, kind)
    options = ("--prompt", "w5") if command == "generate" else ("--out", tmp_path / "out")
    result = run(command, folder, *options)
    assert result.code == 2
    assert result.out == ""
    [line] = result.err.splitlines()
    assert line.startswith("error: ")
    assert SPOILED[kind] in line
    assert str(folder) in line
    assert [path.name for path in tmp_path.iterdir()] == ["spoiled"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "nothing/here/at-all"], "does not exist"),
        (["inspct", "x"], "Did you mean `veneer inspect`?"),
        (["xyz"], "There are: inspect, generate"),
        (["serve"], "There is no base to serve."),
        (["merge", "a", "base", "b", "--out", "out"], "Further adapters follow --adapter."),
        (["inspect"], "`veneer inspect --help`"),
        (["inspect", "x", "--jsn"], "--jsn"),
        (["inspect", "x", "y"], "`veneer inspect --help`"),
        (["--nope"], "--nope"),
        (["generate", "{made}/adapter"], "--prompt"),
        (["generate", "{made}/adapter", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "{made}/adapter", "--prompt", "x", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["generate", "{made}/set", "--prompt", "x", "--adapter", "othr"], "Did you mean 'other'?"),
        (["generate", "{made}/adapter", "--prompt", "x", "--base", "{made}/adapter"], "is an adapter, not a base"),
        (["generate", "{made}/base", "--prompt", "x", "--base", "{made}/base"], "takes no base"),
        (["merge", "{made}/base", "--out", "{made}/out"], "nothing to merge"),
        (["merge", "{made}/adapter", "--out", "{made}/base"], "is not empty"),
        (["merge", "{made}/adapter", "--out", "{made}/base", "--overwrite"], "is the base itself"),
        (["merge", "{made}/adapter", "--base", "{made}/set", "--out", "{made}/out"], "is an adapter, not a base"),
        (["merge", "{made}/adapter", "--out", "{made}/out", "--dtype", "float17"], "float17"),
        (["convert-pickle", "{made}/adapter"], "holds no pickled checkpoint"),
        (["digest", "{made}/adapter"], "is an adapter, and the digest is of a base model"),
        (["digest", "--adapter", "{made}/base"], "/base: there is no adapter_config.json, so this is no adapter"),
        (["digest", "--adapter", "--full", "{made}/adapter"], "--full is for bases"),
        (["digest", "--adapter", "{made}/none"], "is no folder"),
    ],
)
def test_bad_arguments(run: Run, made: Path, arguments: list[str], words: str) -> None:
    before = sorted(made.rglob("*"))
    result = run(*(argument.format(made=made) for argument in arguments))
    assert (result.code, result.out) == (2, "")
    [line] = result.err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert sorted(made.rglob("*")) == before


def test_a_fault_of_ours_is_said_to_be_ours(run: Run, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr("veneer.checkpoints.inspection.inspect_path.inspect", fail)
    result = run("inspect", made / "adapter")
    assert (result.code, result.err.strip()) == (
        1,
        "internal error: ZeroDivisionError: oh no (VENEER_DEBUG=1 shows where)",
    )
    monkeypatch.setenv("VENEER_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("inspect", made / "adapter")


def test_an_interruption(run: Run, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("veneer.checkpoints.inspection.inspect_path.inspect", interrupt)
    result = run("inspect", made / "adapter")
    assert (result.code, result.err) == (130, "interrupted\n")


def test_a_reader_that_goes_away(made: Path) -> None:
    command = f"{sys.executable} -m veneer inspect {made / 'set'} --json | head -c 10"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, env=os.environ)
    assert (len(result.stdout), result.stderr) == (10, "")


def refused(result: Any) -> str:
    """The one line that a command said before it left with 2."""
    assert (result.code, result.out) == (2, "")
    [line] = result.err.splitlines()
    assert line.startswith("error: ")
    return str(line)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a--b", "does not exist"),
        ("name.git", "does not exist"),
        ("x" * 300, "x"),
        ("", "empty string"),
        ("owner/name", "the network is switched off"),
        ("{made}/adaptr", "Did you mean"),
        ("{made}/adapter/adapter_config.json", "no safetensors file"),
        ("/dev/null", "neither a file nor a folder"),
        ("s3://bucket/model", "is a URL, and only a model's page"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "generate", "merge", "convert-pickle", "digest"])
def test_a_path_that_is_none(
    run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str, words: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    options = {"generate": ["--prompt", "w5"], "merge": ["--out", "out"]}.get(command, [])
    line = refused(run(command, name.format(made=made), *options))
    if command != "convert-pickle":  # which takes paths only, and any file for a pickle
        assert words in line
    assert list(tmp_path.iterdir()) == []


def test_each_damage_of_a_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    for content, words in (
        (b"", "it has 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Run git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "truncated, or no safetensors"),
        ((4).to_bytes(8, "little") + b"{bad", "no valid JSON"),
    ):
        file.write_bytes(content)
        for command in (["inspect"], ["digest"], ["generate", "--prompt", "x"]):
            assert words in refused(run(command[0], file, *command[1:]))


def test_what_is_said_cannot_steer_the_terminal(run: Run, tmp_path: Path) -> None:
    line = refused(run("inspect", tmp_path / "a\x1b[2J\nb"))
    assert r"a\x1b[2J\nb" in line
    assert "\x1b" not in line
    assert r"\x1b" in refused(run("\x1b[31m"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", ""], "The prompt is empty"),
        (["--prompt", "  "], "The prompt is empty"),
        (["--prompt", "w5", "--merge", "--adapter", "__base__"], "Leave out one of the two"),
        (["--prompt", "w5", "--merge", "--adapter", "othr"], "Did you mean 'other'?"),
        (["--prompt", "w5", "--seed", "-1"], "--seed"),
        (["--prompt", "w5", "--seed", str(1 << 70)], "--seed"),
        (["--prompt", "w5", "--temperature", "-1"], "--temperature"),
        (["--prompt", "w5", "--temperature", "nan"], "--temperature"),
        (["--prompt", "w5", "--dtype", "int8"], "Unknown dtype 'int8'"),
        (["--prompt", "w5", "--top-p", "1.5"], "--top-p"),
        (["--prompt", "w5", "--top-p", "nan"], "--top-p"),
        (["--prompt", "w5", "--top-k", "-1"], "--top-k"),
        (["--prompt", "w5", "--top-k", "3", "--temperature", "0"], "Leave out one of them"),
        (["--prompt", "w5", "--stop", ""], "--stop is an empty string"),
        (["--prompt", "w5", "--device", "gpu"], "The device 'gpu' cannot be used"),
    ],
)
def test_options_of_generate(run: Run, made: Path, options: list[str], words: str) -> None:
    assert words in refused(run("generate", made / "set", *options, "--max-new-tokens", "2"))


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('no system role here') }}"])
def test_a_chat_template_that_fails(run: Run, chat: Path, template: str) -> None:
    (chat / "chat_template.jinja").write_text(template)
    line = refused(run("generate", chat, "--prompt", "w5", "--max-new-tokens", "2"))
    assert "chat template refuses" in line
    assert "--no-chat" in line
    assert run("generate", chat, "--prompt", "w5", "--max-new-tokens", "2", "--no-chat").code == 0


def test_standard_input_that_is_no_text(made: Path) -> None:
    command = [sys.executable, "-m", "veneer", "generate", str(made / "adapter"), "--prompt", "-"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    result = subprocess.run(command, input=b"\xff\xfe", capture_output=True, check=False, env=environment)
    assert (result.returncode, result.stdout) == (2, b"")
    [line] = result.stderr.decode().splitlines()
    assert line.startswith("error: Standard input is no text")


@pytest.mark.parametrize("out", ["file", "file/deeper"])
def test_a_merge_that_has_no_place(run: Run, made: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("kept")
    refused(run("merge", made / "adapter", "--out", tmp_path / out))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_merge_keeps_what_it_must_not_replace(run: Run, made: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("kept")
    for options in ([], ["--overwrite"]):
        refused(run("merge", made / "adapter", "--out", tmp_path, *options))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    mine = shutil.copytree(made / "adapter", tmp_path / "mine")
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    assert "other than a plain model" in refused(run("merge", mine, "--out", mine, "--overwrite"))
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before


def test_a_merge_that_fails_late_leaves_nothing(
    run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("disk full")

    old = shutil.copytree(made / "base", tmp_path / "old")
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    monkeypatch.setattr("veneer.merging.output.write_folder.copy_companions", fail)
    for out, options in (("out", []), ("old", ["--overwrite"])):
        assert "disk full" in refused(run("merge", made / "adapter", "--out", tmp_path / out, *options))
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before


def test_the_debug_switch_shows_the_traceback(made: Path) -> None:
    code = (
        "import veneer.checkpoints.inspection.inspect_path, veneer.cli, sys\n"
        "def fail(*a, **k): raise ZeroDivisionError('on purpose')\n"
        "veneer.checkpoints.inspection.inspect_path.inspect = fail\n"
        "sys.exit(veneer.cli.main(['inspect', '.']))"
    )
    for switch, wanted in (("", "internal error: ZeroDivisionError: on purpose"), ("1", "Traceback (most recent")):
        environment = {**os.environ, "VENEER_DEBUG": switch}
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
        )
        assert result.returncode == 1
        assert result.stderr.startswith(wanted)
        assert ("Traceback" in result.stderr) == bool(switch)
