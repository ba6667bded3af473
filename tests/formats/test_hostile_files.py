"""Files of other tools that are cut off, mixed up or hostile: each has an error of its own, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.formats import diffusion_bases as bases
from tests.random_adapters import edit_config, edit_tensors, saved, saved_base
from veneer.errors import (
    BaseModelError,
    BindError,
    CorruptFileError,
    NonFiniteError,
    OutputError,
    UsageError,
    VeneerError,
)
from veneer.formats.original_config import KEY

TARGETS = ("serving", "mlx", "gguf")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved_base(tmp_path / "base")


def in_format(name: str, tmp_path: Path, base: Path) -> Path:
    out = tmp_path / ("out.gguf" if name == "gguf" else "out")
    veneer.convert(saved(tmp_path / "adapter"), out, to=name, base=base)
    return out


def weights(path: Path) -> Path:
    return path if path.is_file() else next(path.glob("adapter*.safetensors"))


@pytest.mark.parametrize("name", [*TARGETS, "kohya"])
@pytest.mark.parametrize("length", [0, 2, 4, 40, 0.5, -1])
def test_every_command_says_the_same_of_a_file_that_is_cut_off(
    name: str, length: float, tmp_path: Path, base: Path
) -> None:
    out = tmp_path / ("out.safetensors" if name == "kohya" else "out.gguf" if name == "gguf" else "out")
    veneer.convert(saved(tmp_path / "adapter"), out, to=name, base=base)
    file = weights(out)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(length * len(whole)) if isinstance(length, float) else length])
    messages = {said_by(call) for call in commands(out, tmp_path / "again", base)}
    assert len(messages) == 1
    assert f"{file} is damaged" in messages.pop()


def test_every_command_refuses_what_inspect_calls_no_adapter(tmp_path: Path, base: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04")
    messages = {said_by(call) for call in commands(tmp_path / "x.npz", tmp_path / "again", base)}
    assert len(messages) == 1
    assert "no adapter in a format that is known" in messages.pop()


def test_inspect_says_that_weights_of_an_older_version_are_not_read(tmp_path: Path, base: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapters.npz").write_bytes(b"PK\x03\x04")
    for path in (tmp_path / "old", tmp_path / "old" / "adapters.npz"):
        messages = {said_by(call) for call in commands(path, tmp_path / "again", base)}
        assert len(messages) == 1
        assert "wrote no config" in messages.pop()


def commands(path: Path, out: Path, base: Path) -> list[Callable[[], Any]]:
    """The calls that take an adapter, of which none may write anything."""
    return [
        lambda: veneer.inspect(path),
        lambda: veneer.convert(path, out, base=base),
        lambda: veneer.load(path, base=base),
        lambda: veneer.load(base).load_adapter(path, adapter_name="again"),
        lambda: veneer.merge(path, base, out=out),
    ]


def said_by(call: Callable[[], Any]) -> str:
    """The error or the first problem that a call tells, with its hint."""
    try:
        result = call()
    except VeneerError as error:
        return f"{error.message} {error.hint}"
    return f"{result.problems[0].message} {result.problems[0].hint}"


@pytest.mark.parametrize("name", TARGETS)
def test_a_file_that_is_cut_off(name: str, tmp_path: Path, base: Path) -> None:
    out = in_format(name, tmp_path, base)
    file = weights(out)
    whole = file.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.99):
        file.write_bytes(whole[: int(share * len(whole))])
        for call in (
            lambda: veneer.convert(out, tmp_path / "again", base=base),
            lambda: veneer.load(out, base=base),
            lambda: veneer.merge(out, base, out=tmp_path / "again"),
        ):
            with pytest.raises(VeneerError):
                call()
        assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_file_with_flipped_bytes_has_an_error_or_loads(
    name: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    base = saved_base(folder / "base")
    out = in_format(name, folder, base)
    content = bytearray(weights(out).read_bytes())
    for _ in range(3):
        content[data.draw(st.integers(0, min(len(content), 3000) - 1))] = data.draw(st.integers(0, 255))
    weights(out).write_bytes(bytes(content))
    try:
        veneer.convert(out, folder / "again", base=base)
    except VeneerError:
        assert not (folder / "again").exists()


@pytest.mark.parametrize(
    "travelled",
    [
        "",
        "[" * 10_000,
        "null",
        "[]",
        '{"config": []}',
        '{"config": {"peft_type": "LORA", "r": -1}, "modules": "DIGEST"}',
        '{"config": {"peft_type": "NOPE"}, "modules": "DIGEST"}',
        '{"config": {"peft_type": "LORA", "r": 4, "target_modules": "(a+)+$"}, "modules": "DIGEST"}',
        '{"config": {"peft_type": "LORA", "r": 4, "alora_invocation_tokens": [1]}, "modules": "DIGEST"}',
        '{"config": {"peft_type": "LORA", "r": 1000000000, "lora_alpha": 1}, "modules": "DIGEST"}',
    ],
)
def test_a_config_that_travelled_cannot_change_what_the_file_says(travelled: str, tmp_path: Path, base: Path) -> None:
    out = in_format("mlx", tmp_path, base)
    values = json.loads((out / "adapter_config.json").read_text())
    digest = json.loads(values[KEY])["modules"]
    edit_config(out, **{KEY: travelled.replace("DIGEST", digest)})
    veneer.convert(out, tmp_path / "again", base=base)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (config["r"], config["alora_invocation_tokens"]) == (4, None)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def _with(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {
        key: change(tensor) if "q_proj.lora_A" in key else tensor for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("name", TARGETS)
def test_values_that_are_no_numbers(name: str, tmp_path: Path, base: Path) -> None:
    adapter = saved(tmp_path / "adapter")
    edit_tensors(adapter, _with(lambda tensor: tensor * float("nan")))
    with pytest.raises(NonFiniteError, match=r"q_proj\.lora_A"):
        veneer.convert(adapter, tmp_path / "out", to=name, base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mlx", "gguf"])
def test_the_wrong_base(name: str, tmp_path: Path, base: Path) -> None:
    adapter = saved(tmp_path / "adapter")
    edit_tensors(adapter, _with(lambda tensor: tensor[:, 1:].contiguous()))
    with pytest.raises(BindError, match="q_proj"):
        veneer.convert(adapter, tmp_path / "out", to=name, base=base)
    with pytest.raises(BaseModelError):
        veneer.convert(saved(tmp_path / "other"), tmp_path / "out", to=name, base=tmp_path / "other")


def test_files_of_two_adapters_mixed_up(tmp_path: Path) -> None:
    unet = bases.stored(tmp_path / "unet", bases.unet())
    layers = {"mid_block.attentions.0.proj_in": (8, 8, 1, 1)}
    veneer.convert(bases.lora(tmp_path / "adapter", layers), tmp_path / "x.safetensors", to="kohya", base=unet)
    tensors = load_file(tmp_path / "x.safetensors")
    save_file({**tensors, "model.layers.0.q.lora_a": torch.ones(2, 2)}, tmp_path / "mixed.safetensors")
    with pytest.raises(VeneerError):
        veneer.convert(tmp_path / "mixed.safetensors", tmp_path / "out", base=unet)
    key = next(key for key in tensors if "lora_up" in key)
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, tmp_path / "half.safetensors")
    with pytest.raises(VeneerError, match="proj_in"):
        veneer.convert(tmp_path / "half.safetensors", tmp_path / "out", base=unet)
    save_file({f"lora_unet_nowhere.{k.partition('.')[2]}": t for k, t in tensors.items()}, tmp_path / "odd.safetensors")
    with pytest.raises(BindError, match="lora_unet_nowhere"):
        veneer.convert(tmp_path / "odd.safetensors", tmp_path / "out", base=unet)
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken_or_closed(tmp_path: Path, base: Path) -> None:
    adapter = saved(tmp_path / "adapter")
    (tmp_path / "taken.gguf").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        veneer.convert(adapter, tmp_path / "taken.gguf", to="gguf", base=base)
    with pytest.raises(VeneerError):
        veneer.convert(adapter, tmp_path / "taken.gguf" / "below", to="mlx", base=base)
    assert (tmp_path / "taken.gguf").read_text() == "mine"


def test_keys_with_the_adapters_name_in_them(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter")
    edit_tensors(adapter, lambda tensors: {k.replace(".weight", ".default.weight"): t for k, t in tensors.items()})
    veneer.convert(adapter, tmp_path / "served", to="serving")
    assert veneer.check_serving(tmp_path / "served").fits


def test_a_header_that_lies(tmp_path: Path, base: Path) -> None:
    out = in_format("mlx", tmp_path, base)
    content = weights(out).read_bytes()
    weights(out).write_bytes((2**62).to_bytes(8, "little") + content[8:])
    with pytest.raises(CorruptFileError):
        veneer.convert(out, tmp_path / "again", base=base)
    assert [problem.code for problem in veneer.inspect(out).problems] == ["damaged"]


def test_a_component_that_is_not_there(tmp_path: Path) -> None:
    unet = bases.stored(tmp_path / "unet", bases.unet())
    layers = {"mid_block.attentions.0.proj_in": (8, 8, 1, 1)}
    veneer.convert(bases.lora(tmp_path / "adapter", layers), tmp_path / "x.safetensors", to="diffusers", base=unet)
    with pytest.raises((UsageError, BindError), match="text_encoder"):
        veneer.convert(tmp_path / "x.safetensors", tmp_path / "out", component="text_encoder", base=unet)
