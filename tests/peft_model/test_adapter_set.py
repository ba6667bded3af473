"""Several adapters in one folder: which they are, their order, and which are active."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from veneer.checkpoints import save_set
from veneer.errors import CorruptFileError
from veneer.files import adapter_folders
from veneer.files.source import Source


def folder(root: Path, *names: str, **record: Any) -> Source:
    """A folder with adapters of these names (their configs alone) and perhaps a set file."""
    for name in names:
        place = adapter_folders.place(root, name)
        place.mkdir(parents=True, exist_ok=True)
        (place / "adapter_config.json").write_text("{}")
    if record:
        (root / adapter_folders.SET_FILE).write_text(json.dumps(record))
    return Source(root, "here")


def names(source: Source) -> list[str]:
    return [member.name for member in adapter_folders.members(source)]


def active(source: Source) -> list[str]:
    return adapter_folders.active(source, adapter_folders.members(source))


def test_default_lies_at_the_root(tmp_path: Path) -> None:
    assert adapter_folders.place(tmp_path, "default") == tmp_path
    assert adapter_folders.place(tmp_path, "french") == tmp_path / "french"


@pytest.mark.parametrize("at", [(), ("default",)])
def test_one_adapter_or_none_is_no_set(at: tuple[str, ...], tmp_path: Path) -> None:
    assert adapter_folders.members(folder(tmp_path, *at)) == []


def test_members_are_found_by_their_configs(tmp_path: Path) -> None:
    source = folder(tmp_path, "default", "b", "a")
    (tmp_path / "notes").mkdir()
    (tmp_path / "model.safetensors").touch()
    found = adapter_folders.members(source)
    assert [(m.name, m.source.root, m.source.origin) for m in found] == [
        ("default", tmp_path, "here"),
        ("a", tmp_path / "a", "here/a"),
        ("b", tmp_path / "b", "here/b"),
    ]


def test_without_one_at_the_root_there_is_no_default(tmp_path: Path) -> None:
    assert names(folder(tmp_path, "a")) == ["a"]


def test_a_single_file_is_no_set(tmp_path: Path) -> None:
    source = folder(tmp_path, "default", "a")
    assert adapter_folders.members(Source(tmp_path, "here", file=source.root / "x.safetensors")) == []


def test_a_trainers_states_are_no_members_unless_named(tmp_path: Path) -> None:
    source = folder(tmp_path, "default", "checkpoint-50", "checkpoint-best")
    assert names(source) == ["default", "checkpoint-best"]
    folder(tmp_path, adapters=["default", "checkpoint-50"])
    assert names(source) == ["default", "checkpoint-50", "checkpoint-best"]


@pytest.mark.parametrize("name", [".old", ".x.writing-1", "v1.5"])
def test_a_folder_that_cannot_name_an_adapter_is_no_member(name: str, tmp_path: Path) -> None:
    assert adapter_folders.members(folder(tmp_path, "default", name)) == []


def test_the_set_file_gives_order_and_choice(tmp_path: Path) -> None:
    source = folder(
        tmp_path, "default", "a", "b", "c", adapters=["b", "default", "gone"], active=["default", "gone", "c"]
    )
    assert names(source) == ["b", "default", "a", "c"]
    assert active(source) == ["default", "c"]


@pytest.mark.parametrize("record", [{}, {"active": []}, {"active": ["gone"]}])
def test_the_first_is_active_where_nothing_says(record: dict[str, Any], tmp_path: Path) -> None:
    assert active(folder(tmp_path, "a", "b", **record)) == ["a"]


@pytest.mark.parametrize("name", ["../outside", "/etc", "a/b"])
def test_a_name_in_the_file_leads_nowhere_else(name: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    folder(tmp_path, "outside")
    source = folder(inside, "a", adapters=[name], active=[name])
    assert (names(source), active(source)) == (["a"], ["a"])


@pytest.mark.parametrize("record", [{"adapters": "a"}, {"active": [1]}, {"adapters": {"a": 1}}, {"active": None}])
def test_a_set_file_that_says_nonsense(record: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="lists of names") as caught:
        adapter_folders.members(folder(tmp_path, "a", **record))
    assert "adapter_set.json" in caught.value.message
    assert "Delete the file" in (caught.value.hint or "")


def test_a_set_file_that_is_no_json(tmp_path: Path) -> None:
    source = folder(tmp_path, "a")
    (tmp_path / adapter_folders.SET_FILE).write_text('{"active":')
    with pytest.raises(CorruptFileError, match="line 1, column 11"):
        adapter_folders.members(source)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    source = folder(tmp_path, "default", "a", "b")
    save_set.write(tmp_path, ["b", "default", "a"], ["a", "elsewhere"])
    assert (names(source), active(source)) == (["b", "default", "a"], ["a"])


def test_a_single_default_needs_no_set_file(tmp_path: Path) -> None:
    folder(tmp_path, "default", adapters=["default", "a"])
    save_set.write(tmp_path, ["default"], ["default"])
    assert not (tmp_path / adapter_folders.SET_FILE).exists()
    save_set.write(tmp_path, ["a"], ["a"])
    assert json.loads((tmp_path / adapter_folders.SET_FILE).read_text()) == {"adapters": ["a"], "active": ["a"]}
