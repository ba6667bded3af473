"""Pickles become safetensors on request, and nothing in them runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.adapters import WEIGHTS, saved
from tests.models import build, inputs, logits
from veneer.errors import CorruptFileError, NotACheckpointError, PickleRefusedError, SourceError
from veneer.pickles import convert_pickle


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "sprung")


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
