"""Damaged manifests, deltas, configs and headers raise an error that says so, and nothing is written."""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import saved_base
from veneer.errors import ConfigError, CorruptFileError, IncompleteCheckpointError, MergeError, VeneerError
from veneer.merging.output import unmerge

MANIFEST = "merge_manifest.json"
DELTA = "merge_delta/model.safetensors.zip"


# -- the manifest ----------------------------------------------------------------------------------------------

ODD: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "base gone": lambda v: v.pop("base"),
    "base a list": lambda v: v.update(base=[]),
    "digests null": lambda v: v["base"].update(digests=None),
    "no digests": lambda v: v["base"].update(digests={}),
    "a digest null": lambda v: v["base"].update(digests={"config.json": None}),
    "a digest of an unknown algorithm": lambda v: v["base"].update(digests={"config.json": "md5:0"}),
    "origin null": lambda v: v["base"].update(origin=None),
    "outputs null": lambda v: v.update(outputs=None),
    "adapters null": lambda v: v.update(adapters=None),
    "an adapter null": lambda v: v.update(adapters=[None]),
    "a weight of text": lambda v: v["adapters"][0].update(weight="1"),
    "a weight of NaN": lambda v: v["adapters"][0].update(weight=float("nan")),
    "an unknown option": lambda v: v["options"].update(x=1),
    "a dtype of 5": lambda v: v["options"].update(dtype=5),
    "a seed that is true": lambda v: v["options"].update(seed=True),
    "options null": lambda v: v.update(options=None),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_damaged_manifest(odd: str, made: Path, tmp_path: Path) -> None:
    merged = shutil.copytree(made / "merged", tmp_path / "merged")
    values = json.loads((merged / MANIFEST).read_text())
    ODD[odd](values)
    (merged / MANIFEST).write_text(json.dumps(values))
    for run in (
        lambda: veneer.unmerge(merged, out=tmp_path / "out"),
        lambda: veneer.verify(merged, made / "adapter", made / "base", logits=False),
    ):
        with pytest.raises(CorruptFileError, match="is not what a merge writes there"):
            run()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("options", [{"dtype": "manual_seed"}, {"rounding": "up"}, {"task": "x"}])
def test_options_of_no_merge(options: dict[str, Any], made: Path, tmp_path: Path) -> None:
    merged = shutil.copytree(made / "merged", tmp_path / "merged")
    values = json.loads((merged / MANIFEST).read_text())
    values["options"].update(options)
    (merged / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(ConfigError):
        veneer.verify(merged, made / "adapter", made / "base", logits=False)


# -- the delta -------------------------------------------------------------------------------------------------


def packed(data: bytes) -> Callable[[dict[str, bytes], str], None]:
    return lambda parts, block: parts.update({block: data})


def told(**changes: bytes) -> Callable[[dict[str, bytes], str], None]:
    return lambda parts, block: parts.update({name.replace("_", "."): data for name, data in changes.items()})


def header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, bytes], str], None]:
    """Put another header into the delta."""

    def change(parts: dict[str, bytes], block: str) -> None:
        values = json.loads(parts["header"][8:])
        edit(values)
        text = json.dumps(values).encode()
        parts["header"] = len(text).to_bytes(8, "little") + text

    return change


def first(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(info for info in values.values() if info.get("data_offsets", [1])[0] == 0)
    return found


BLOCKS: Mapping[str, Callable[[dict[str, bytes], str], Any]] = {
    "a block of another size": packed(zlib.compress(bytes(1000))),
    "a block of 3 bytes": packed(zlib.compress(b"abc")),
    "a block that unfolds without end": packed(zlib.compress(bytes(1 << 26))),
    "a block that is no zlib": packed(b"abc"),
    "an empty block": packed(b""),
    "no table": lambda parts, block: parts.pop("tensors.json"),
    "a table of null": told(tensors_json=b"null"),
    "a table of numbers": told(tensors_json=b"[1, 2]"),
    "a table that is no JSON": told(tensors_json=b"{"),
    "no header": told(header=b""),
    "a header of another length": told(header=bytes(20)),
    "a header of null": told(header=(4).to_bytes(8, "little") + b"null"),
    "a tensor of another size": header(lambda values: first(values).update(shape=[1], data_offsets=[0, 4])),
    "a tensor of an exabyte": header(lambda values: first(values).update(shape=[1 << 58], data_offsets=[0, 1 << 60])),
}


@pytest.mark.parametrize("damage", BLOCKS)
def test_a_damaged_delta(damage: str, made: Path, tmp_path: Path) -> None:
    merged = shutil.copytree(made / "merged", tmp_path / "merged")
    with zipfile.ZipFile(merged / DELTA) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    BLOCKS[damage](parts, next(name for name in parts if "/" in name))
    with zipfile.ZipFile(merged / DELTA, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(CorruptFileError, match=r"is damaged|cannot be written: (its header|the data)"):
        veneer.unmerge(merged, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("file", [DELTA, "merge_delta/small.zip"])
@pytest.mark.parametrize(("at", "value"), [(10, 99), (10, 14), (10, 12), (8, 1), (24, 255), (42, 255), (0, 0)])
def test_a_damaged_archive(file: str, at: int, value: int, made: Path, tmp_path: Path) -> None:
    """Try an unknown compression, another one than is written, a mark of encryption, and wrong sizes and offsets."""
    merged = shutil.copytree(made / "merged", tmp_path / "merged")
    raw = bytearray((merged / file).read_bytes())
    entry = raw.find(b"PK\x01\x02")
    if entry < 0:  # an archive with nothing in it
        raw, entry, at = raw[:-1], 0, 0
    raw[entry + at] = value
    (merged / file).write_bytes(raw)
    try:
        veneer.unmerge(merged, out=tmp_path / "out")
    except (CorruptFileError, MergeError):
        assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    else:  # what was damaged is not needed
        for path in (made / "base").iterdir():
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_delta_that_is_gone(made: Path, tmp_path: Path) -> None:
    merged = shutil.copytree(made / "merged", tmp_path / "merged")
    (merged / DELTA).unlink()
    with pytest.raises(MergeError, match="not what the manifest records"):
        veneer.unmerge(merged, out=tmp_path / "out")
    (merged / "merge_delta" / "small.zip").unlink()
    with pytest.raises(VeneerError, match=r"small\.zip"):
        veneer.unmerge(merged, out=tmp_path / "out")


def test_large_members_are_not_unfolded(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = shutil.copytree(made / "merged", tmp_path / "merged")
    monkeypatch.setattr(unmerge, "_MAX_HEADER", 8)
    with pytest.raises(CorruptFileError, match="header"):
        veneer.unmerge(merged, out=tmp_path / "out")


# -- the base's config -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["x", 5, [1], True])
@pytest.mark.parametrize(
    "key",
    ["text_config", "quantization_config", "architectures", "model_type", "id2label", "vocab_size", "hidden_size",
     "tie_word_embeddings", "dtype", "num_hidden_layers", "head_dim"],
)  # fmt: skip
def test_a_damaged_config(key: str, value: Any, made: Path, tmp_path: Path) -> None:
    base = shutil.copytree(made / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, key: value}))
    try:
        veneer.merge(made / "adapter", base, out=tmp_path / "out")
    except VeneerError as error:
        assert error.hint  # noqa: PT017 - some of these are no damage
        assert not (tmp_path / "out").exists()
    if key == "text_config" and not isinstance(value, dict):
        with pytest.raises(CorruptFileError, match="text_config"):
            veneer.merge(made / "adapter", base, out=tmp_path / "out2")
        with pytest.raises(VeneerError):
            veneer.load(made / "adapter", base=base)
        (base / "config.json").write_text(json.dumps({**config, key: value, "vocab_size": None}))
        with pytest.raises(CorruptFileError, match="text_config"):
            veneer.load(made / "adapter", base=base)


# -- headers ---------------------------------------------------------------------------------------------------


def rewritten(base: Path, edit: Callable[[dict[str, Any], bytes], bytes]) -> None:
    """Edit a base's header, and append the bytes that ``edit`` returns to the data."""
    file = base / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    values, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    data += edit(values, data)
    text = json.dumps(values).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def extra(dtype: str, nbytes: int) -> Callable[[dict[str, Any], bytes], bytes]:
    def edit(values: dict[str, Any], data: bytes) -> bytes:
        values["extra"] = {"dtype": dtype, "shape": [8], "data_offsets": [len(data), len(data) + nbytes]}
        return bytes(range(nbytes))

    return edit


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "nbytes"), [("U16", 16), ("U32", 32), ("U64", 64), ("C64", 64), ("F4", 4), ("F6_E2M3", 6), ("BOOL", 8)]
)
def test_a_tensor_that_no_adapter_changes_may_be_of_any_dtype(
    kind: str, nbytes: int, dtype: str, made: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(made / "base", tmp_path / "base")
    rewritten(base, extra(kind, nbytes))
    veneer.merge(made / "adapter", base, out=tmp_path / "out", dtype=dtype, reversible=True)
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    info = json.loads(raw[8 : 8 + length])["extra"]
    start, end = (8 + length + at for at in info["data_offsets"])
    assert (info["dtype"], info["shape"], raw[start:end]) == (kind, [8], bytes(range(nbytes)))
    assert veneer.verify(tmp_path / "out", made / "adapter", base, logits=False).passed
    veneer.unmerge(tmp_path / "out", out=tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["C64", "I64", "U64"])
def test_a_tensor_that_an_adapter_changes_is_one_of_weights(kind: str, made: Path, tmp_path: Path) -> None:
    base = shutil.copytree(made / "base", tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj.weight"

    def edit(values: dict[str, Any], data: bytes) -> bytes:
        rows, columns = values[name]["shape"]
        start = len(data)
        values[name + "_old"] = dict(values[name])
        values[name] = {"dtype": kind, "shape": [rows, columns], "data_offsets": [start, start + 8 * rows * columns]}
        return bytes(8 * rows * columns)

    rewritten(base, edit)
    with pytest.raises(MergeError, match=rf"q_proj.weight, which the base stores as {kind}"):
        veneer.merge(made / "adapter", base, out=tmp_path / "out")


def test_a_name_that_is_no_text(made: Path, tmp_path: Path) -> None:
    base = shutil.copytree(made / "base", tmp_path / "base")
    rewritten(base, lambda values, data: values.setdefault("__metadata__", {}).update(x="\ud800") or b"")
    with pytest.raises(CorruptFileError, match="damaged"):
        veneer.merge(made / "adapter", base, out=tmp_path / "out")


# -- scales of float8 ------------------------------------------------------------------------------------------


def float8(folder: Path, shape: Callable[[int, int], tuple[int, ...]], **how: Any) -> dict[str, Tensor]:
    """Store a model's layers in float8 with scales of some shape, each another; the values that they stand for."""
    saved_base(folder)
    tensors = load_file(folder / "model.safetensors")
    values = dict(tensors)
    for name, weight in list(tensors.items()):
        if "proj" in name:
            size = shape(*weight.shape)
            count = torch.Size(size).numel()
            scale = float(weight.abs().max() / 448) * (1 + torch.arange(count).reshape(size) / max(count, 1))
            tensors[name] = (weight / float(weight.abs().max() / 448)).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = scale
            if count in (1, weight.shape[0]):
                values[name] = tensors[name].float() * scale.reshape(-1, 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "quantization_config": {"quant_method": "fp8", **how}}
    path.write_text(json.dumps(config))
    return values


BLOCK = {"weight_block_size": [128, 128]}
RIGHT = {
    "one a row, a vector": (lambda rows, columns: (rows,), BLOCK),
    "one a row, a column": (lambda rows, columns: (rows, 1), {}),
    "one a row, no blocks": (lambda rows, columns: (rows,), {"weight_block_size": None}),
    "one": (lambda rows, columns: (1,), {}),
    "one block": (lambda rows, columns: (1, 1), BLOCK),
}
WRONG = {
    "none": (lambda rows, columns: (0, 0), BLOCK),
    "too many": (lambda rows, columns: (2, 3), BLOCK),
    "one a column": (lambda rows, columns: (1, columns), BLOCK),
    "two for all": (lambda rows, columns: (2,), {"weight_block_size": None}),
    "blocks where there are none": (lambda rows, columns: (2, 2), {"weight_block_size": None}),
    "blocks of text": (lambda rows, columns: (1, 1), {"weight_block_size": "128"}),
    "blocks of nothing": (lambda rows, columns: (1, 1), {"weight_block_size": [0, 0]}),
}


@pytest.mark.parametrize("how", RIGHT)
def test_scales_of_rows_and_of_all(how: str, made: Path, tmp_path: Path) -> None:
    shape, options = RIGHT[how]
    values = float8(tmp_path / "base", shape, **options)
    veneer.merge(made / "adapter", tmp_path / "base", out=tmp_path / "out", dequantize=True, dtype="float32")
    model: Any = build("llama")
    model.load_state_dict(values)
    expected = logits(veneer.PeftModel.from_pretrained(model, made / "adapter"), inputs("llama"))
    assert gap(logits(veneer.load(tmp_path / "out"), inputs("llama")), expected) < 1e-5


@pytest.mark.parametrize("how", WRONG)
def test_scales_that_do_not_fit(how: str, made: Path, tmp_path: Path) -> None:
    shape, options = WRONG[how]
    float8(tmp_path / "base", shape, **options)
    with pytest.raises(CorruptFileError, match=r"no scales of|weight_block_size"):
        veneer.merge(made / "adapter", tmp_path / "base", out=tmp_path / "out", dequantize=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(value: float, made: Path, tmp_path: Path) -> None:
    float8(tmp_path / "base", lambda rows, columns: (rows,), **BLOCK)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    next(tensor for name, tensor in tensors.items() if name.endswith("_scale"))[0] = value
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFileError, match="infinite scales"):
        veneer.merge(made / "adapter", tmp_path / "base", out=tmp_path / "out", dequantize=True)


def test_a_folder_without_a_manifest(made: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompleteCheckpointError):
        veneer.unmerge(made / "base", out=tmp_path / "out")
