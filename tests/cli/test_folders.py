"""Commands that would leave a folder, or replace what they read: one line, exit code 2, and nothing changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.printing import one_line

Run = Callable[..., Any]


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    for name in ("base", "adapter"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def refused(run: Run, world: Path, *arguments: Any) -> str:
    before = tree(world)
    result = run(*arguments)
    assert (result.code, result.out) == (2, ""), result.err
    assert tree(world) == before
    [line] = result.err.splitlines()
    assert line.startswith("error: ")
    assert line == one_line(line)
    return str(line)


def test_a_merge(run: Run, world: Path) -> None:
    merge = ("merge", world / "adapter", "--base", world / "base", "--overwrite", "--out")
    assert "is the base itself" in refused(run, world, *merge, world / "base")
    shutil.copytree(world / "base", world / "out")
    (world / "out" / "notes").mkdir()
    (world / "out" / "notes" / "mine").touch()
    assert "plain model and would be lost: notes" in refused(run, world, *merge, world / "out")
    (world / "secret").touch()
    (world / "adapter" / "notes.txt").symlink_to("../secret")
    assert "notes.txt is a link" in refused(run, world, *merge, world / "new")


def test_taking_it_back(run: Run, world: Path) -> None:
    merged = world / "merged"
    assert run("merge", world / "adapter", "--base", world / "base", "--out", merged, "--reversible").code == 0
    assert "is the merged folder itself" in refused(run, world, "unmerge", merged, "--out", merged, "--overwrite")
    path = merged / "merge_manifest.json"
    values = json.loads(path.read_text())
    for name, words in (("../../\x1b[2J", "outside of its folder"), ("/etc/passwd", "outside of its folder")):
        path.write_text(json.dumps({**values, "base": {**values["base"], "digests": {name: "sha256:0"}}}))
        assert words in refused(run, world, "unmerge", merged, "--out", world / "back")
        assert words in refused(run, world, "verify", merged, "--no-logits")
    path.write_text(json.dumps({**values, "base": None}))
    assert "is not what a merge writes" in refused(run, world, "unmerge", merged, "--out", world / "back")


def test_extracting(run: Run, world: Path) -> None:
    shutil.copytree(world / "adapter", world / "base", dirs_exist_ok=True)
    shutil.copytree(world / "base", world / "tuned")
    pair = ("--tuned", world / "tuned", "--base", world / "base", "--overwrite", "--out")
    assert "is the base itself" in refused(run, world, "extract", *pair, world / "base")
    assert "is the tuned model itself" in refused(run, world, "extract", *pair, world / "tuned")


def test_measuring(run: Run, world: Path) -> None:
    pytest.importorskip("matplotlib")
    (world / "report.md").write_text("a prompt")
    bench = ("bench", world / "adapter", "--base", world / "base", "--prompts", world / "report.md")
    assert "report.md is read" in refused(run, world, *bench, "--out", world)
