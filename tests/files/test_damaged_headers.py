"""Damaged headers and JSON, each a real file: refused wherever the reader of the values would refuse them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tests.files.headers import described, written
from veneer.errors import CorruptFileError, PathNotFoundError, SourceError
from veneer.files.json_file import read_json
from veneer.files.safetensors_header import read_header

# -- headers -------------------------------------------------------------------------------------------------


def test_a_header_tells_what_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros(()), "none": torch.zeros(0, 4)}
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert {name: (t.dtype, t.shape, t.nbytes, t.numel) for name, t in header.tensors.items()} == {
        "a": ("BF16", (2, 3), 12, 6),
        "b": ("F32", (), 4, 1),
        "none": ("F32", (0, 4), 0, 0),
    }
    assert header.metadata == {"format": "pt"}
    assert header.nbytes == 16
    assert header.data_start + header.nbytes == path.stat().st_size


def test_the_data_lies_where_the_header_says(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    value = torch.arange(6.0)
    save_file({"first": torch.zeros(3), "second": value}, path)
    header = read_header(path)
    info = header.tensors["second"]
    raw = path.read_bytes()[header.data_start + info.start : header.data_start + info.end]
    assert raw == value.numpy().tobytes()


DAMAGED: dict[str, tuple[Any, int, str]] = {
    "bad JSON": (b"{bad", 0, "no valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', 0, "no valid JSON"),
    "nested without end": (b"[" * 100_000, 0, "no valid JSON"),
    "a number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", 0, "no valid JSON"),
    "a list": ([1], 0, "no JSON object"),
    "an entry that is no object": ({"a": 3}, 0, "does not describe 'a'"),
    "an entry without offsets": ({"a": {"dtype": "F32", "shape": [1]}}, 4, "does not describe 'a'"),
    "one offset": ({"a": described(offsets=[0])}, 16, "does not describe 'a'"),
    "a shape of text": ({"a": described(shape="22")}, 16, "does not describe 'a'"),
    "a fractional shape": ({"a": described(shape=[2.0, 2])}, 16, "does not describe 'a'"),
    "an infinite shape": (b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 16]}}', 16, "describe 'a'"),
    "a dtype that is no text": ({"a": described(dtype=32)}, 16, "does not describe 'a'"),
    "a negative offset": ({"a": described(offsets=[-16, 0])}, 16, "gives 'a' 16 bytes"),
    "negative sizes": ({"a": described(shape=[-2, -2])}, 16, "gives 'a' 16 bytes"),
    "a dtype of another size": ({"a": described(dtype="F16")}, 16, "gives 'a' 16 bytes for shape [2, 2] of F16"),
    "truncated": ({"a": described()}, 10, "truncated: its tensors take 16 bytes, and 10 are there"),
    "bytes left over": ({"a": described()}, 20, "its tensors take 16 bytes, and 20 are there"),
    "overlapping": ({"a": described(), "b": described(offsets=[8, 24])}, 24, "'b' overlaps"),
    "a hole": ({"a": described(), "b": described(offsets=[24, 40])}, 40, "hole before"),
    "metadata of numbers": ({"__metadata__": {"k": 3}, "a": described()}, 16, "__metadata__"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header_is_told_apart(case: str, tmp_path: Path) -> None:
    header, data, words = DAMAGED[case]
    path = written(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CorruptFileError) as caught:
        read_header(path)
    assert words in caught.value.message
    assert str(path) in caught.value.message
    assert "again" in (caught.value.hint or "")


@pytest.mark.parametrize("case", DAMAGED)
def test_it_refuses_no_file_that_the_reader_of_values_takes(case: str, tmp_path: Path) -> None:
    header, data, _ = DAMAGED[case]
    with pytest.raises(SafetensorError):
        safe_open(written(tmp_path / "x.safetensors", header, data), framework="pt").__enter__()


def test_a_tensor_named_twice(tmp_path: Path) -> None:
    entry = json.dumps(described())
    path = written(tmp_path / "x.safetensors", f'{{"a": {entry}, "a": {entry}}}'.encode())
    with pytest.raises(CorruptFileError, match="names a tensor twice"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "words", "hint"),
    [
        (b"", "it has 0 bytes", "again"),
        (b"abc", "it has 3 bytes", "again"),
        (b"\xff" * 100, "truncated, or no safetensors", "again"),
        ((50).to_bytes(8, "little") + b"{}", "its header would take 50 bytes, and the file has 10", "again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer", "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<title>Sign in</title>", "a web page", "download it again"),
        (b"<html><body>404</body></html>", "a web page", "download it again"),
    ],
)
def test_what_is_no_safetensors_file(content: bytes, words: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError) as caught:
        read_header(path)
    assert words in caught.value.message
    assert hint in (caught.value.hint or "")


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(PathNotFoundError, match="No such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(SourceError, match="Is a directory"):
        read_header(tmp_path)


# -- JSON ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "line 1, column 1"),
        (b'{\n "r": 8,\n}', "line 3, column 1"),
        (b"[1]", "holds a list, not a JSON object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"r": ' + b"8" * 5000 + b"}", "cannot be read"),
    ],
)
def test_a_bad_json_file_says_where_it_breaks(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError) as caught:
        read_json(path)
    assert words in caught.value.message
    assert str(path) in caught.value.message


def test_a_json_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PathNotFoundError, match=r"none\.json"):
        read_json(tmp_path / "none.json")
