"""A file that is written appears whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from veneer.errors import AdapterError, MergeError, OutputError, SourceError
from veneer.files.atomic_write import atomic_write
from veneer.files.output_folder import check_output


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "x.txt"
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent.parent == target.parent  # one file system, so that the last step is one rename
    assert target.read_text() == "new"
    assert names(target.parent) == ["x.txt"]


def test_it_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")

    def write_half() -> None:
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_a_failure_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "x.txt") as temporary:
        temporary.write_text(str(1 / 0))
    assert names(tmp_path) == []


def test_a_block_that_writes_nothing_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "x.txt"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_mode_is_the_users(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / "x.txt") as temporary:
            temporary.touch(mode=0o600)
        assert stat.S_IMODE((tmp_path / "x.txt").stat().st_mode) == 0o666 & ~mask
        assert os.umask(mask) == mask  # asking for the mask did not change it
    finally:
        os.umask(before)


@pytest.mark.parametrize("name", ["file/x.txt", "file/deeper/x.txt"])
def test_a_place_where_nothing_can_be_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, no folder")
    with pytest.raises(OutputError, match="cannot be written: ") as caught, atomic_write(tmp_path / name):
        pytest.fail("the block ran")
    assert str(tmp_path / name) in caught.value.message
    assert caught.value.hint == "Choose another place."
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("overwrite", [None, False])
def test_an_output_may_go_where_nothing_is(overwrite: bool | None, tmp_path: Path) -> None:
    check_output(tmp_path, overwrite)
    check_output(tmp_path / "deep" / "er", overwrite)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "overwrite", "message", "hint"),
    [
        ("", None, "is not empty", "Choose another folder."),
        ("", False, "is not empty", "or pass --overwrite (overwrite=True)"),
        ("file", True, "is a file", "a folder that does not exist yet"),
        ("file/deeper", True, "cannot be written: Not a directory", "another place"),
        ("x" * 300, True, "cannot be written: File name too long", "another place"),
    ],
)
# What a report file or a pickle, a conversion and a merge raised before there was a class for it.
@pytest.mark.parametrize("error", [OutputError, SourceError, AdapterError, MergeError, ValueError])
def test_an_output_that_cannot_be_written(
    name: str, overwrite: bool | None, message: str, hint: str, error: type[Exception], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(error, match=message) as caught:
        check_output(tmp_path / name, overwrite)
    assert isinstance(caught.value, OutputError)
    assert hint in str(caught.value.hint)
    check_output(tmp_path, overwrite=True)
