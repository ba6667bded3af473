"""``veneer verify``, ``unmerge`` and ``extract``: what they tell, their exit codes, and bad input in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import veneer
from tests.models import gap, inputs, logits

Run = Callable[..., Any]
MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def merged(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reversible merge of the adapter."""
    out = tmp_path_factory.mktemp("merged") / "out"
    veneer.merge(made / "adapter", made / "base", out=out, reversible=True)
    return out


def told(run: Run, *arguments: str | Path) -> Any:
    result = run(*arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def refused(result: Any) -> str:
    """The one line that a command says when it is the input's fault."""
    assert (result.code, result.out) == (2, "")
    [line] = result.err.splitlines()
    assert line.startswith("error: ")
    return str(line)


def spoiled(merged: Path, tmp_path: Path) -> Path:
    """A copy with one weight changed."""
    folder = shutil.copytree(merged, tmp_path / "spoiled")
    tensors = load_file(folder / MODEL)
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name][0, 0] += 0.5
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    return folder


def test_verify_passes_and_fails(run: Run, made: Path, merged: Path, tmp_path: Path) -> None:
    from_manifest = told(run, "verify", merged)
    assert from_manifest["passed"] is True
    given = ("--adapter", made / "adapter", "--base", made / "base", "--sample", "2", "--no-logits")
    assert told(run, "verify", merged, *given)["passed"] is True
    shown = run("verify", merged, "--no-logits")
    assert shown.code == 0
    assert "pass" in shown.out
    result = run("verify", spoiled(merged, tmp_path), "--no-logits", "--json")
    assert (result.code, json.loads(result.out)["passed"]) == (2, False)


def test_what_cannot_be_verified(run: Run, made: Path, merged: Path, tmp_path: Path) -> None:
    assert "merge_manifest.json" in refused(run("verify", made / "base"))
    assert "nowhere" in refused(run("verify", tmp_path / "nowhere"))
    assert "nowhere" in refused(run("verify", merged, "--base", tmp_path / "nowhere"))
    assert "nowhere" in refused(run("verify", merged, "--adapter", tmp_path / "nowhere"))


@pytest.mark.parametrize("source", ["the delta", "the base"])
def test_unmerge_restores_every_byte(run: Run, made: Path, merged: Path, tmp_path: Path, source: str) -> None:
    options = ("--base", made / "base") if source == "the base" else ()
    report = told(run, "unmerge", merged, "--out", tmp_path / "back", *options)
    assert report["out"] == str(tmp_path / "back")
    for path in (tmp_path / "back").iterdir():
        assert path.read_bytes() == (made / "base" / path.name).read_bytes()
    assert (tmp_path / "back" / MODEL).is_file()


def test_what_cannot_be_unmerged(run: Run, made: Path, merged: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "back")
    assert "merge_manifest.json" in refused(run("unmerge", made / "base", *out))
    assert "nowhere" in refused(run("unmerge", tmp_path / "nowhere", *out))
    assert "manifest records" in refused(run("unmerge", merged, *out, "--base", merged))
    plain = tmp_path / "plain"
    veneer.merge(made / "adapter", made / "base", out=plain)
    assert "--base" in refused(run("unmerge", plain, *out))
    assert not (tmp_path / "back").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("kept")
    for more in ([], ["--overwrite"]):
        refused(run("unmerge", merged, "--out", tmp_path / "full", *more))
    assert (tmp_path / "full" / "notes.txt").read_text() == "kept"


def test_extract_finds_the_adapter_again(run: Run, made: Path, merged: Path, tmp_path: Path) -> None:
    options = ("--tuned", merged, "--base", made / "base", "--out", tmp_path / "found", "--rank", "4")
    report = told(run, "extract", *options)
    assert report["error"] < 1e-3
    assert set(report["ranks"].values()) == {4}
    expected = logits(veneer.load(made / "adapter"), inputs("llama"))
    assert gap(logits(veneer.load(tmp_path / "found"), inputs("llama")), expected) < 1e-4
    assert "not empty" in refused(run("extract", *options))
    shown = run("extract", *options, "--overwrite")
    assert shown.code == 0
    assert "extract report" in shown.out


def test_what_cannot_be_extracted(run: Run, made: Path, merged: Path, tmp_path: Path) -> None:
    base, out = ("--base", made / "base"), ("--out", tmp_path / "found")
    assert "no adapter to extract" in refused(run("extract", "--tuned", made / "base", *base, *out))
    assert "nowhere" in refused(run("extract", "--tuned", tmp_path / "nowhere", *base, *out))
    assert "rank=0" in refused(run("extract", "--tuned", merged, *base, *out, "--rank", "0"))
    assert "energy=2" in refused(run("extract", "--tuned", merged, *base, *out, "--energy", "2"))
    assert "dtype" in refused(run("extract", "--tuned", merged, *base, *out, "--dtype", "int9"))
    assert not (tmp_path / "found").exists()
