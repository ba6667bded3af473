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

from tests.adapters import CONFIG, WEIGHTS, edit_config, edit_tensors

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
        (["digest", "{made}/adapter"], "no weights"),
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

    monkeypatch.setattr("veneer.inspection.inspect", fail)
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

    monkeypatch.setattr("veneer.inspection.inspect", interrupt)
    result = run("inspect", made / "adapter")
    assert (result.code, result.err.strip()) == (130, "interrupted")


def test_a_reader_that_goes_away(made: Path) -> None:
    command = f"{sys.executable} -m veneer inspect {made / 'set'} --json | head -c 10"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, env=os.environ)
    assert (len(result.stdout), result.stderr) == (10, "")
