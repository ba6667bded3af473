"""A restart: sources that are as they were are not read again, and all that changed is."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.serving.registry_world import World, run
from tests.serving.tiny_adapters import write_adapter
from veneer.serving.fetch import Fetch
from veneer.serving.registered_name import RegisteredName
from veneer.serving.registry_database import StoredName
from veneer.serving.registry_types import AdapterInfo
from veneer.serving.serving_errors import AdapterInvalidError, AdapterTooLargeError
from veneer.serving.store import StoreLimits


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are copied from sources."""
    copied: list[str] = []

    def copy(fetch: Fetch, files: Any, name: str, target: Path) -> bytes:
        copied.append(name)
        return original(fetch, files, name, target)

    original = Fetch._copied
    monkeypatch.setattr(Fetch, "_copied", copy)
    return copied


def age(folder: Path) -> None:
    """Let a folder's files be those of long ago."""
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))


def restarted(root: Path, reads: list[str], limits: StoreLimits | None = None) -> tuple[World, AdapterInfo]:
    """Start a registry anew, and register the first source; ``reads`` holds what was read of it."""
    sources = {path: path.read_bytes() for path in root.glob("sources/0/*")}
    world = World(root, limits=limits, adapters=0)
    world.sources = [root / "sources" / "0"]
    infos: list[AdapterInfo] = []
    reads.clear()

    async def work() -> None:
        infos.append(await world.register("a", replace=True, check=False))
        await world.ask("a")

    run(world, work())
    assert sources == {path: path.read_bytes() for path in root.glob("sources/0/*")}
    return world, infos[0]


def first_start(root: Path, reads: list[str]) -> AdapterInfo:
    write_adapter(root / "sources" / "0", 0)
    age(root / "sources" / "0")
    return restarted(root, reads)[1]


def test_an_unchanged_source_is_not_read_again(tmp_path: Path, reads: list[str]) -> None:
    info = first_start(tmp_path, reads)
    assert len(reads) == 2
    for _ in range(2):
        again = restarted(tmp_path, reads)[1]
        assert (again.current, again.versions) == (info.current, info.versions)
        assert not reads


def changed_in_place(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, (1e9, 1e9))  # the size and the time of the change are as before


def changed_by_another_file(folder: Path) -> None:
    other = write_adapter(folder.parent / "other", 7)
    age(other)
    (other / "adapter_model.safetensors").replace(folder / "adapter_model.safetensors")


def with_one_more(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    age(folder)


@pytest.mark.parametrize("change", [changed_in_place, changed_by_another_file, with_one_more])
def test_a_source_that_changed_is_a_new_version(tmp_path: Path, reads: list[str], change: Any) -> None:
    info = first_start(tmp_path, reads)
    change(tmp_path / "sources" / "0")
    again = restarted(tmp_path, reads)[1]
    assert reads
    assert again.current is not None
    assert info.current is not None
    assert (again.current.number, again.current.digest == info.current.digest) == (2, False)


def test_a_source_that_changed_just_now_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    first_start(tmp_path, reads)
    os.utime(tmp_path / "sources" / "0" / "adapter_config.json")
    for _ in range(2):
        assert restarted(tmp_path, reads)[1].current.number == 1  # type: ignore[union-attr]
        assert reads


def test_other_limits_are_asked_of_an_unchanged_source_too(tmp_path: Path, reads: list[str]) -> None:
    first_start(tmp_path, reads)
    with pytest.raises(AdapterTooLargeError, match="rank 2, and 1 is allowed"):
        restarted(tmp_path, reads, StoreLimits(rank=1))


def test_what_the_store_lost_is_fetched_again(tmp_path: Path, reads: list[str]) -> None:
    info = first_start(tmp_path, reads)
    assert info.adapter is not None
    info.adapter.folder.chmod(0o755)
    shutil.rmtree(info.adapter.folder)
    assert restarted(tmp_path, reads)[1].current == info.current
    assert reads


@pytest.mark.parametrize("missing", [True, False])
def test_what_the_store_has_in_part_is_fetched_again(tmp_path: Path, reads: list[str], missing: bool) -> None:
    info = first_start(tmp_path, reads)
    assert info.adapter is not None
    info.adapter.folder.chmod(0o755)
    path = info.adapter.folder / "adapter_model.safetensors"
    path.unlink()
    if not missing:
        path.write_bytes(b"cut off")
    world, again = restarted(tmp_path, reads)
    assert again.current == info.current
    assert reads
    assert world.folders() == {info.adapter.folder.name}


def test_what_the_store_has_damaged_is_found_before_it_is_used(tmp_path: Path, reads: list[str]) -> None:
    info = first_start(tmp_path, reads)
    assert info.adapter is not None
    path = info.adapter.folder / "adapter_model.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(AdapterInvalidError, match="no whole adapter"):
        restarted(tmp_path, reads)
    assert restarted(tmp_path, reads)[1].current == info.current
    assert reads


def test_a_name_that_nobody_uses_takes_less_than_a_kilobyte_beside_its_row() -> None:
    rows = [StoredName(f"n{number}", 1, 2, False, ()) for number in range(1000)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        names = [RegisteredName(row) for row in rows]
        assert tracemalloc.get_traced_memory()[0] - before < 1000 * len(names)
    finally:
        tracemalloc.stop()
