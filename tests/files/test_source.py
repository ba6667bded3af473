"""Finding files and reading headers: every way in which they can be wrong."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from veneer.errors import (
    CorruptFileError,
    IncompleteCheckpointError,
    NotACheckpointError,
    PathNotFoundError,
    PickleRefusedError,
    SourceError,
)
from veneer.files.json_file import read_json
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import DTYPE_BITS
from veneer.files.resolve import looks_like_hub_id, resolve
from veneer.files.safetensors_header import read_header
from veneer.files.source import PICKLES, Source
from veneer.files.weight_files import weight_files


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, whatever it says."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def test_a_header_is_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "empty": torch.zeros(0, 2), "s": torch.tensor(1)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "note": "hello"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: info.shape for name, info in header.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert {name: info.dtype for name, info in header.tensors.items()} == {
        "a": "F32",
        "b": "BF16",
        "empty": "F32",
        "s": "I64",
    }
    assert header.nbytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert header.metadata == {"format": "pt", "note": "hello"}
    a = header.tensors["a"]
    raw = (tmp_path / "x.safetensors").read_bytes()[header.data_start + a.start : header.data_start + a.end]
    assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.float32).view(a.shape), tensors["a"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (b"short", "5 bytes"),
        (struct.pack("<Q", 1 << 40) + b"{}", "truncated, or no safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "a web page"),
        (struct.pack("<Q", 4) + b"{{{{", "no valid JSON"),
        (struct.pack("<Q", 4) + b"\xff\xfe\x00\x00", "no valid JSON"),
        (struct.pack("<Q", 2) + b"[]", "no JSON object"),
    ],
)
def test_what_is_no_header(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=words):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry(0, 8)}, b"1234", "truncated: its tensors take 8 bytes, and 4 are there"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", "'b' overlaps"),
        ({"a": entry(0, 4, [3])}, b"1234", r"gives 'a' 4 bytes for shape \[3\] of U8"),
        ({"a": entry(0, 4, [2], "F32")}, b"1234", "of F32"),
        ({"a": entry(4, 0, [0])}, b"1234", "gives 'a'"),
        ({"a": {"dtype": "U8", "shape": [1]}}, b"1", "does not describe 'a'"),
        ({"a": {"dtype": "U8", "shape": "x", "data_offsets": [0, 1]}}, b"1", "does not describe 'a'"),
        (b'{"a": 1, "a": 2}', b"", "names a tensor twice"),
    ],
)
def test_a_header_that_contradicts_itself(tmp_path: Path, header: Any, data: bytes, words: str) -> None:
    with pytest.raises(CorruptFileError, match=words):
        read_header(write(tmp_path / "x.safetensors", header, data))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=200), st.integers(0, 220) | st.none())
def test_no_bytes_lead_to_another_error(tmp_path: Path, raw: bytes, length: int | None) -> None:
    path = write(tmp_path / "x.safetensors", raw, length=length)
    with contextlib.suppress(CorruptFileError):
        header = read_header(path)
        assert header.data_start <= path.stat().st_size


def test_json_says_where_it_breaks(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{\n  "a": 1,\n  oops\n}')
    with pytest.raises(CorruptFileError, match="line 3, column 3"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(CorruptFileError, match="a list, not a JSON object"):
        read_json(path)
    path.write_text("")
    with pytest.raises(CorruptFileError, match="The file is empty"):
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptFileError, match="not UTF-8"):
        read_json(path)


def test_a_folder_a_file_and_a_subfolder(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert resolve(tmp_path).root == tmp_path
    assert resolve(str(tmp_path)).origin == str(tmp_path)
    assert resolve(tmp_path, LookupOptions(subfolder="inner")).root == tmp_path / "inner"
    single = resolve(tmp_path / "x.safetensors")
    assert (single.root, single.file) == (tmp_path, tmp_path / "x.safetensors")
    with pytest.raises(PathNotFoundError, match="no subfolder 'other'"):
        resolve(tmp_path, LookupOptions(subfolder="other"))
    with pytest.raises(CorruptFileError, match="outside of its folder"):
        resolve(tmp_path, LookupOptions(subfolder="../x"))


def test_nothing_there_names_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    with pytest.raises(PathNotFoundError, match=r"Did you mean .*adapters\?"):
        resolve(tmp_path / "adaptrs")
    with pytest.raises(PathNotFoundError, match=r"Did you mean .*adapters\?"):
        resolve(str(tmp_path / "adaptrs" / "deeper"))
    with pytest.raises(PathNotFoundError, match="The base is an empty string"):
        resolve(" ", what="base")


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(NotACheckpointError, match="no safetensors file"):
        resolve(tmp_path / "notes.txt")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(PickleRefusedError, match="veneer convert-pickle"):
        resolve(tmp_path / "adapter_model.bin")
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with pytest.raises(CorruptFileError):
        resolve(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..", "..\\x", ""])
def test_no_name_leaves_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorruptFileError, match="outside of its folder"):
        Source(tmp_path, "here").path(name)


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    source = Source(tmp_path, "here")
    with pytest.raises(IncompleteCheckpointError, match="no weights"):
        weight_files(source, "model")
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    (tmp_path / "one.safetensors").touch()
    with pytest.raises(IncompleteCheckpointError, match=r"1 of 2 shards are missing: two\.safetensors"):
        weight_files(source, "model")
    (tmp_path / "two.safetensors").touch()
    assert [path.name for path in weight_files(source, "model")] == ["one.safetensors", "two.safetensors"]
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CorruptFileError, match="outside of its folder"):
        weight_files(source, "model")
    index.write_text("{}")
    with pytest.raises(CorruptFileError, match="no weight_map"):
        weight_files(source, "model")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("gpt2", True), ("owner/name-1.0", True), ("./x", False), ("/a/b", False), ("a/b/c", False), ("a..b", False)],
)
def test_what_can_be_a_hub_id(text: str, expected: bool) -> None:
    assert looks_like_hub_id(text) is expected


CACHED = """
import socket, sys
def refuse(*a, **k): raise SystemExit("network used")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from veneer.files.lookup_options import LookupOptions
from veneer.files.resolve import resolve
import veneer
source = resolve("owner/name", LookupOptions(local_files_only={local}))
print(source.commit, sorted(source.files()), veneer.inspect("owner/name", local_files_only={local}).kind)
"""


@pytest.mark.parametrize("local", [True, False])
def test_a_hub_id_in_the_cache_needs_no_network(tmp_path: Path, local: bool) -> None:
    repo, commit = tmp_path / "models--owner--name", "c" * 40
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    save_file({"a": torch.zeros(1)}, snapshot / "model.safetensors")
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", CACHED.format(local=local)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.split() == [commit, "['config.json',", "'model.safetensors']", "model"], result.stderr


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_mode_is_obeyed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(name, "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PathNotFoundError, match="the network is switched off"):
        resolve("nobody/nothing")


@pytest.mark.parametrize(
    "text", ["a--b", "name.git", "name-", "-name", ".name", "owner-/name", "x" * 97, "owner/" + "x" * 97, "é", "a/b/c"]
)
def test_what_the_hub_takes_for_no_id(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert not looks_like_hub_id(text)
    with pytest.raises(PathNotFoundError, match="does not exist"):
        resolve(text)


@given(st.text("ab1-_./é", max_size=12) | st.from_regex(r"\w+[.-]{1,2}\w+/?\w*", fullmatch=True))
def test_every_hub_id_is_one_for_the_hub(text: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if looks_like_hub_id(text):
        try:
            validate_repo_id(text)
        except HFValidationError as error:
            pytest.fail(f"{text!r}: {error}")


@pytest.mark.parametrize("name", ["link", "./link"])
def test_a_link_that_leads_nowhere(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(PathNotFoundError, match="'link' is a link to 'nowhere', which does not exist") as caught:
        resolve(name)
    assert "Mend the link" in (caught.value.hint or "")


def test_what_is_neither_file_nor_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotACheckpointError, match="neither a file nor a folder"):
        resolve(tmp_path / "pipe")


def test_a_folder_that_is_closed_to_us(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # To the superuser no folder is closed, so the answer of the system is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(SourceError, match="cannot be read: Permission denied") as caught:
        resolve(tmp_path, what="base")
    assert caught.value.message.startswith(f"The base {tmp_path} ")


@pytest.mark.parametrize("subfolder", ["..", "../..", "a/../../..", "/etc"])
def test_a_subfolder_does_not_lead_out_of_a_cached_repository(
    subfolder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorruptFileError, match="points outside of its folder"):
        resolve("owner/name", LookupOptions(subfolder=subfolder, local_files_only=True))


def test_a_missing_revision_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PathNotFoundError, match="'nobody/nothing' at 'v9' is neither"):
        resolve("nobody/nothing", LookupOptions("v9", local_files_only=True))


def test_an_index_of_odd_names(tmp_path: Path) -> None:
    source = Source(tmp_path, "here")
    index = tmp_path / "model.safetensors.index.json"
    for names in (["/etc/passwd"], ["a/../../b.safetensors"], [""], ["..\\b"], ["x\0y"]):
        index.write_text(json.dumps({"weight_map": dict(enumerate(names))}))
        with pytest.raises(CorruptFileError, match="outside of its folder"):
            weight_files(source, "model")
    for value in ([], {}, "x", None, 3):
        index.write_text(json.dumps({"weight_map": value}))
        with pytest.raises(CorruptFileError, match="has no weight_map"):
            weight_files(source, "model")
    index.write_text(json.dumps({"weight_map": {"a": 3, "b": None}}))
    with pytest.raises(IncompleteCheckpointError, match="2 of 2 shards are missing: 3, None"):
        weight_files(source, "model")


def test_one_file_comes_before_shards_and_shards_before_pickles(tmp_path: Path) -> None:
    source = Source(tmp_path, "here")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(PickleRefusedError, match=r"only as a pickle \(pytorch_model.bin\)"):
        weight_files(source, "model")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    (tmp_path / "part.safetensors").touch()
    assert weight_files(source, "model") == [tmp_path / "part.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert weight_files(source, "model") == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize(("stem", "name"), sorted((stem, name) for stem, names in PICKLES.items() for name in names))
def test_every_kind_of_pickle_is_refused(stem: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(PickleRefusedError, match="can run code") as caught:
        weight_files(Source(tmp_path, "here"), stem)
    assert caught.value.hint == "If you trust it: veneer convert-pickle here"


# -- against the reader that the values come from -----------------------------------------------------------

SHAPES = st.lists(st.sampled_from([0, 1, 2, 8, 1 << 40, 1 << 64, 1 << 70]), max_size=2)
DTYPES = st.sampled_from([*DTYPE_BITS, "X4", "f32"])


@st.composite
def near_headers(draw: st.DrawFn) -> bytes:
    """A whole file whose header is right, or wrong in one or two places."""
    position, header = 0, {}
    for name in draw(st.lists(st.text(max_size=3), unique=True, max_size=3)):
        dtype, shape = draw(DTYPES), draw(SHAPES)
        size = min(math.prod(shape) * DTYPE_BITS.get(dtype, 8) // 8, 256)
        end = position + size
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [position, end + draw(st.sampled_from([0] * 9 + [1]))],
        }
        position = end
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.none() | st.dictionaries(st.text(max_size=2), st.text(max_size=2) | st.none()))
    raw = json.dumps(header).encode() + draw(st.sampled_from([b"", b"  ", b"x"]))
    return struct.pack("<Q", len(raw)) + raw + bytes(position + draw(st.sampled_from([0] * 9 + [1])))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(near_headers())
def test_it_takes_what_the_reader_of_values_takes_and_nothing_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    try:
        with safe_open(path, framework="pt") as file:
            expected: set[str] | None = set(file.keys())
    except SafetensorError:
        expected = None
    try:
        found: set[str] | None = set(read_header(path).tensors)
    except CorruptFileError:
        found = None
    assert found == expected


TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]),
        st.lists(st.integers(0, 3), max_size=3),
    ),
    max_size=5,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(TENSORS, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2) | st.none())
def test_what_safetensors_writes_is_read_back(
    tmp_path: Path, described: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str] | None
) -> None:
    tensors = {name: torch.ones(shape, dtype=dtype) for name, (dtype, shape) in described.items()}
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata or None)
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == (metadata or {})
    assert {name: (info.shape, info.numel, info.nbytes) for name, info in header.tensors.items()} == {
        name: (tuple(tensor.shape), tensor.numel(), tensor.nbytes) for name, tensor in tensors.items()
    }
    assert header.data_start + header.nbytes == (tmp_path / "x.safetensors").stat().st_size
