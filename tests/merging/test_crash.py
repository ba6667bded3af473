"""The output is whole or not there, whatever happens on the way, and a merge that was cut off can go on."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.models import build
from tests.random_adapters import saved
from veneer.errors import CorruptFileError, MergeError
from veneer.merging.output import write_folder as room
from veneer.merging.output.staging import StagingFolder
from veneer.merging.work.pieces import MergeLayer


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Make ``base/`` in several files, ``adapter/``, and ``right/``, the output of the merge."""
    model: Any = build("llama")
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    saved(tmp_path / "adapter")
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 3
    veneer.merge(tmp_path / "adapter", tmp_path / "base", out=tmp_path / "right")
    return tmp_path


def content(folder: Path) -> dict[str, Any]:
    """Return every file's bytes; of the manifest all but the norms, whose last digit depends on memory addresses."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    values = json.loads(found.pop("merge_manifest.json", b"{}"))
    return {**found, "manifest": {key: value for key, value in values.items() if key not in ("tensors", "summary")}}


def merge(world: Path, out: str = "out", **options: Any) -> veneer.MergeReport:
    return veneer.merge(world / "adapter", world / "base", out=world / out, **options)


def hidden(world: Path) -> list[str]:
    return [path.name for path in world.iterdir() if path.name.startswith(".")]


def die_after(monkeypatch: pytest.MonkeyPatch, pieces: int, error: BaseException) -> None:
    """Let the merge fail when so many layers are done."""
    run, done = MergeLayer.run, iter(range(10**6))

    def dying(self: MergeLayer, sink: Any) -> Any:
        if next(done) >= pieces:
            raise error
        return run(self, sink)

    monkeypatch.setattr(MergeLayer, "run", dying)


def test_a_failure_leaves_nothing(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    die_after(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        merge(world)
    assert not (world / "out").exists()
    assert hidden(world) == []


def test_a_merge_that_is_refused_closes_the_base(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise MergeError("refused")

    monkeypatch.setattr("veneer.merging.work.prepare.bind_adapters", refuse)
    with pytest.raises(MergeError, match="refused"):
        merge(world)
    open_files = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [path for path in open_files if path.startswith(str(world / "base"))]


def test_it_goes_on_from_the_files_that_are_finished(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        die_after(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge(world, resume=True)
    assert hidden(world) == [".out.merging"]
    journal = json.loads((world / ".out.merging" / "journal.json").read_text())
    finished = set(journal["finished"])
    assert finished
    assert veneer.inspect(world / ".out.merging" / "model").kind != "model", "half of a model is not taken for one"
    made: list[str] = []
    make = room.FileSink.make
    monkeypatch.setattr(room.FileSink, "make", lambda self, file: (made.append(file.name), make(self, file))[1])
    # One of the finished files was damaged meanwhile: it is found out and written again.
    damaged = world / ".out.merging" / "model" / min(finished)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    merge(world, resume=True)
    assert finished & set(made) == {min(finished)}
    assert content(world / "out") == content(world / "right")
    assert hidden(world) == []


def test_killed_when_all_but_the_exchange_is_done(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest of the killed run is no output of the next one."""

    def dying(self: StagingFolder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StagingFolder, "commit", dying)
        with pytest.raises(KeyboardInterrupt):
            merge(world, resume=True)
    assert (world / ".out.merging" / "model" / "merge_manifest.json").is_file()
    merge(world, resume=True)
    assert content(world / "out") == content(world / "right")


def test_resuming_something_else_is_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        die_after(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge(world, resume=True)
    with pytest.raises(MergeError, match=r"made from something else \(options"):
        merge(world, resume=True, dtype="bfloat16")
    merge(world)
    assert content(world / "out") == content(world / "right")


def forked(action: Callable[[], Any]) -> int:
    """Start a process that does something and ends with 0, or with 2 for an error of Veneer's; its id is returned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a process with threads forks: it starts none of them
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        action()
        code = 0
    except veneer.VeneerError:
        code = 2
    finally:
        os._exit(code)


def slow(self: MergeLayer, sink: Any, run: Any = MergeLayer.run) -> Any:
    time.sleep(0.01)
    return run(self, sink)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_any_moment(world: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After kill -9 at any moment ``out`` holds nothing or the whole, and that is right."""
    monkeypatch.setattr(MergeLayer, "run", slow)
    chance, right = random.Random(seed), content(world / "right")
    for _ in range(6):
        child = forked(lambda: merge(world, resume=True))
        time.sleep(chance.random() * 0.12)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (world / "out").exists():
            break
    if (world / "out").exists():
        assert content(world / "out") == right
    else:
        merge(world, resume=True)
    assert content(world / "out") == right


def test_killed_in_the_exchange(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses nothing, even while the folder that was at ``out`` is moved aside."""
    merge(world)
    old = content(world / "out")
    (world / ".out.merging").mkdir()
    (world / "out").rename(world / ".out.merging" / "old")
    die_after(monkeypatch, 0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        merge(world, overwrite=True)
    assert content(world / "out") == old


def test_a_full_disk(world: Path) -> None:
    """The system refuses to let a file grow: its own error is raised, and nothing is left."""

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
        merge(world)

    assert os.waitstatus_to_exitcode(os.waitpid(forked(act), 0)[1]) == 2
    assert not (world / "out").exists()
    assert hidden(world) == []


def test_too_little_space_is_said_before_the_start(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.merging.output.target.shutil.disk_usage", lambda path: _Free)
    with pytest.raises(MergeError, match=r"needs \d+\.\d kB, and the disk has 1\.0 kB left"):
        merge(world)
    assert hidden(world) == []


class _Free:
    free = 1000


def test_a_base_that_changes_meanwhile(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = min((world / "base").glob("model-*.safetensors"))
    run = MergeLayer.run

    def touching(self: MergeLayer, sink: Any) -> Any:
        os.utime(first, ns=(1, 1))
        return run(self, sink)

    monkeypatch.setattr(MergeLayer, "run", touching)
    with pytest.raises(MergeError, match="changed while it was read"):
        merge(world)
    assert not (world / "out").exists()


def test_a_base_that_is_cut_meanwhile(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MergeLayer.run

    def cutting(self: MergeLayer, sink: Any) -> Any:
        for path in (world / "base").glob("model-*.safetensors"):
            os.truncate(path, 200)
        return run(self, sink)

    monkeypatch.setattr(MergeLayer, "run", cutting)
    with pytest.raises((CorruptFileError, MergeError)):
        merge(world)
    assert not (world / "out").exists()
    assert hidden(world) == []


@pytest.mark.parametrize("place", [".", "inner"])
def test_the_current_folder_is_not_replaced(world: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell whose current folder is replaced would be in a folder that is gone."""
    (world / "out" / place).mkdir(parents=True)
    monkeypatch.chdir(world / "out" / place)
    with pytest.raises(MergeError, match="is the current folder, or one above it"):
        merge(world, overwrite=True)
    with pytest.raises(MergeError, match="is the current folder"):
        veneer.merge(world / "adapter", world / "base", out=".")
    assert hidden(world) == []


def test_two_at_once(world: Path) -> None:
    import fcntl

    (world / ".out.merging").mkdir()
    with (world / ".out.merging" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(MergeError, match="Another process is writing"):
            merge(world)
    merge(world)


def test_the_files_are_those_of_the_base_or_of_the_size_asked_for(world: Path) -> None:
    def names(folder: Path) -> set[str]:
        return {path.name for path in folder.glob("model*.safetensors*")}

    assert names(world / "right") == names(world / "base")
    merge(world, "one", max_shard_size="1GB")
    assert names(world / "one") == {"model.safetensors"}
    merge(world, "many", max_shard_size="10KB")
    assert len(names(world / "many")) > len(names(world / "base"))
    every = {path.name: load_file(path) for path in (world / "many").glob("*.safetensors")}
    index = json.loads((world / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, held in sorted(every.items()) for name in held}
    assert index["metadata"]["total_size"] == sum(t.nbytes for held in every.values() for t in held.values())
    one = load_file(world / "one" / "model.safetensors")
    assert all(torch.equal(one[name], tensor) for held in every.values() for name, tensor in held.items())
