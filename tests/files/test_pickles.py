"""Pickles become safetensors on request, and nothing in them runs."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.models import build, inputs, logits
from tests.random_adapters import WEIGHTS, saved
from veneer.errors import (
    CorruptFileError,
    IncompleteCheckpointError,
    NotACheckpointError,
    PathNotFoundError,
    PickleRefusedError,
    SourceError,
    UnsupportedError,
    VeneerError,
)
from veneer.files.convert_pickle import convert_pickle


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "sprung")


def test_a_pickle_is_written_when_asked_for_by_name(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    model, tensors = veneer.PeftModel.from_pretrained(build("llama"), folder), load_file(folder / WEIGHTS)
    expected = logits(model, inputs("llama"))
    model.add_adapter("other", veneer.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(folder, safe_serialization=False)
    pickle_file = folder / "adapter_model.bin"
    assert not [*folder.rglob("*.safetensors")]  # which every tool would read in its place
    assert (folder / "other" / pickle_file.name).is_file()
    written = torch.load(pickle_file, weights_only=True)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in tensors.items())
    assert pickle_file.stat().st_size < 2 * sum(tensor.nbytes for tensor in tensors.values())
    theirs = peft.PeftModel.from_pretrained(build("llama"), folder).eval()
    assert torch.allclose(logits(theirs, inputs("llama")), expected, atol=1e-5)
    with pytest.raises(PickleRefusedError, match=f"veneer convert-pickle {folder}"):
        veneer.PeftModel.from_pretrained(build("llama"), folder)
    convert_pickle(folder)
    assert torch.equal(logits(veneer.PeftModel.from_pretrained(build("llama"), folder), inputs("llama")), expected)
    model.save_pretrained(folder, selected_adapters=["default"])
    assert not pickle_file.exists()


def test_a_pickle_that_cannot_be_written_leaves_the_old_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "adapter")
    model, before = veneer.PeftModel.from_pretrained(build("llama"), folder), (folder / WEIGHTS).read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(VeneerError, match="No space left"):
        model.save_pretrained(folder, safe_serialization=False)
    assert (folder / WEIGHTS).read_bytes() == before
    assert not (folder / "adapter_model.bin").exists()
    veneer.PeftModel.from_pretrained(build("llama"), folder)


def test_a_converted_adapter_loads(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    expected = logits(veneer.PeftModel.from_pretrained(build("llama"), folder), inputs("llama"))
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(PickleRefusedError, match=f"veneer convert-pickle {folder}"):
        veneer.PeftModel.from_pretrained(build("llama"), folder)
    assert convert_pickle(folder) == folder / WEIGHTS
    again = load_file(folder / WEIGHTS)
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert torch.equal(logits(veneer.PeftModel.from_pretrained(build("llama"), folder), inputs("llama")), expected)
    with pytest.raises(SourceError, match="is there already"):
        convert_pickle(folder)


def test_a_model_and_a_named_output(tmp_path: Path) -> None:
    shared = torch.randn(4)
    torch.save({"a": shared, "b": shared[1:3], "c": torch.randn(3, 2).T}, tmp_path / "pytorch_model.bin")
    out = convert_pickle(tmp_path / "pytorch_model.bin", tmp_path / "deep" / "out.safetensors")
    tensors = load_file(out)
    assert torch.equal(tensors["b"], shared[1:3])
    assert tensors["c"].shape == (2, 3)
    assert [path.name for path in out.parent.iterdir()] == ["out.safetensors"]


def test_a_trap_is_not_sprung(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"a": torch.zeros(1), "trap": Trap(sprung)}, tmp_path / "adapter_model.bin")
    with pytest.raises(PickleRefusedError, match="could run code"):
        convert_pickle(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.bin"]
    # The trap is a real one.
    torch.load(tmp_path / "adapter_model.bin", weights_only=False)
    assert sprung.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 torn zip"])
def test_what_is_no_pickle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(content)
    with pytest.raises((CorruptFileError, PickleRefusedError)):
        convert_pickle(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.bin"]


def test_what_is_no_mapping(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "adapter_model.bin")
    with pytest.raises(PickleRefusedError, match="no flat mapping"):
        convert_pickle(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotACheckpointError, match="holds no pickled checkpoint"):
        convert_pickle(tmp_path / "empty")


def test_shards_become_one_file(tmp_path: Path) -> None:
    parts = {"pytorch_model-1.bin": {"a": torch.ones(2)}, "pytorch_model-2.bin": {"b": torch.zeros(3)}}
    for name, tensors in parts.items():
        torch.save(tensors, tmp_path / name)
    weight_map = {key: name for name, tensors in parts.items() for key in tensors}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    out = convert_pickle(tmp_path)
    assert out == tmp_path / "model.safetensors"
    assert {name: tensor.tolist() for name, tensor in load_file(out).items()} == {"a": [1, 1], "b": [0, 0, 0]}


def test_an_output_may_be_a_folder(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "adapter_model.bin")
    assert convert_pickle(tmp_path, tmp_path / "out") == tmp_path / "out" / "adapter_model.safetensors"


def test_safetensors_need_no_conversion(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(NotACheckpointError, match="safetensors already"):
        convert_pickle(tmp_path / "x.safetensors")


def test_bytes_at_which_the_unpickler_itself_fails(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"junk junk")
    with pytest.raises(CorruptFileError, match="damaged, or no pickle"):
        convert_pickle(tmp_path)


class Command:
    """Runs a command of the system when it is unpickled, as a malicious adapter would."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_no_payload_runs_however_the_pickle_is_wrapped(tmp_path: Path, legacy: bool, protocol: int) -> None:
    touched = tmp_path / "touched"
    payload = {"a": torch.zeros(1), "trap": Command(f"touch {touched}")}
    file = tmp_path / "adapter_model.bin"
    torch.save(payload, file, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(PickleRefusedError) as caught:
        convert_pickle(tmp_path)
    assert str(file) in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.bin"]
    veneer.inspect(tmp_path)
    with pytest.raises(VeneerError):
        veneer.load(tmp_path)
    assert not touched.exists()


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"trap": Command(f"touch {tmp_path / 'touched'}")}))
    with pytest.raises((PickleRefusedError, CorruptFileError)):
        convert_pickle(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.bin"]


def test_a_payload_in_the_second_shard_leaves_nothing_written(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "1.bin")
    torch.save({"b": Command(f"touch {tmp_path / 'touched'}")}, tmp_path / "2.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.bin", "b": "2.bin"}}))
    with pytest.raises(PickleRefusedError, match=r"2\.bin"):
        convert_pickle(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.bin", "2.bin", index.name]
    index.write_text(json.dumps({"weight_map": {"a": "../1.bin"}}))
    with pytest.raises(CorruptFileError, match="outside of its folder"):
        convert_pickle(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "3.bin"}}))
    with pytest.raises(IncompleteCheckpointError, match=r"3\.bin"):
        convert_pickle(tmp_path)


def test_every_dtype_keeps_its_bits(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool]
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4)}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    again = load_file(convert_pickle(tmp_path))
    assert again.keys() == tensors.keys()
    assert all(
        again[name].dtype == tensor.dtype and torch.equal(again[name], tensor) for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex128)])
def test_a_tensor_that_safetensors_cannot_hold(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"good": torch.ones(1), "odd": tensor}, tmp_path / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match="safetensors cannot hold") as caught:
        convert_pickle(tmp_path)
    assert str(tmp_path) in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.bin"]


@pytest.mark.parametrize("content", [{1: torch.ones(1)}, {"a": {"b": torch.ones(1)}}, {"epoch": 3}, torch.ones(1)])
def test_other_structures_are_no_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "adapter_model.bin")
    with pytest.raises(PickleRefusedError, match="no flat mapping of names to tensors") as caught:
        convert_pickle(tmp_path)
    assert "state_dict" in (caught.value.hint or "")


def test_an_empty_pickle(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(IncompleteCheckpointError, match="empty checkpoint"):
        convert_pickle(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.bin"]


@pytest.mark.parametrize("out", ["file", "file/deeper", "file/x.safetensors"])
def test_an_output_that_cannot_be_written(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    torch.save({"a": torch.ones(1)}, tmp_path / "adapter_model.bin")
    with pytest.raises(SourceError, match="cannot be written"):
        convert_pickle(tmp_path, tmp_path / out)
    assert (tmp_path / "file").read_bytes() == b""


def test_an_output_that_is_there_is_kept(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "adapter_model.bin")
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    with pytest.raises(SourceError, match=r"mine\.safetensors is there already"):
        convert_pickle(tmp_path, tmp_path / "mine.safetensors")
    assert (tmp_path / "mine.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("kind", [str, Path])
def test_what_is_not_there(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(PathNotFoundError, match="does not exist"):
        convert_pickle(kind(tmp_path / "none"))
    with pytest.raises(PathNotFoundError):
        convert_pickle("owner/name")
