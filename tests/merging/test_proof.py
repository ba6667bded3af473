"""Verifying a merge, undoing it, its manifest, its rounding, and several adapters with weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import saved
from veneer.errors import AdapterError, ConfigError, CorruptFileError, IncompleteCheckpointError, MergeError
from veneer.merging.base import hashing
from veneer.merging.work.rounding import Rounding


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Make ``base/`` in bfloat16, ``adapter/`` and ``other/``."""
    model: Any = build("llama").bfloat16()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    saved(tmp_path / "adapter")
    saved(tmp_path / "other", seed=5, r=2)
    return tmp_path


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "merge_manifest.json").read_text())
    return found


def merge(world: Path, out: str = "out", adapter: Any = None, **options: Any) -> veneer.MergeReport:
    return veneer.merge(adapter or world / "adapter", world / "base", out=world / out, **options)


def delta(world: Path, adapter: str = "adapter") -> dict[str, Tensor]:
    """Compute the adapter's change of each weight, in double precision, by hand."""
    config = json.loads((world / adapter / "adapter_config.json").read_text())
    tensors, scale = load_file(world / adapter / "adapter_model.safetensors"), config["lora_alpha"] / config["r"]
    names = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    return {
        name.removeprefix("base_model.model.") + ".weight": scale
        * (tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double())
        for name in names
    }


def test_the_figures_are_right(world: Path) -> None:
    report = merge(world)
    before, after, change = weights(world / "base"), weights(world / "out"), delta(world)
    figures = {one["name"]: one for one in manifest(world / "out")["tensors"] if one["change"]}
    assert figures.keys() == change.keys()
    for name, one in figures.items():
        exact = before[name].double() + change[name]
        assert one["change"] == pytest.approx(float(change[name].norm()), rel=1e-5)
        assert one["rounding_error"] == pytest.approx(float((after[name].double() - exact).norm()), rel=1e-3)
        assert one["survives"] == pytest.approx(1 - (one["rounding_error"] / one["change"]) ** 2)
    assert report.changed_tensors == len(change)
    assert 0.99 < report.survives < 1
    assert report.warnings == []


def test_the_manifest_tells_every_file(world: Path) -> None:
    merge(world)
    found = manifest(world / "out")
    for folder, digests in ((world / "base", found["base"]["digests"]), (world / "out", found["outputs"]["digests"])):
        assert {p.name for p in folder.iterdir()} - {"merge_manifest.json", "model.safetensors.index.json"} <= {
            *digests
        }
        for name, digest in digests.items():
            assert digest == f"blake3:{blake3((folder / name).read_bytes()).hexdigest()}"
    assert found["adapters"][0]["weight"] == 1.0
    assert found["options"]["rounding"] == "nearest"


def in_cache(world: Path) -> Path:
    """Lay the base out as the hub's client does: large files are named by their SHA-256, small ones by another."""
    blobs, snapshot = world / "models--acme--base" / "blobs", world / "models--acme--base" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in (world / "base").iterdir():
        algorithm = "sha256" if path.suffix == ".safetensors" else "sha1"
        blob = blobs / hashlib.new(algorithm, path.read_bytes()).hexdigest()
        (snapshot / path.name).symlink_to(f"../../blobs/{shutil.copyfile(path, blob).name}")
    shutil.rmtree(world / "base")
    (world / "base").symlink_to(snapshot)
    return snapshot


def test_digests_that_the_hubs_cache_knows_are_not_computed(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, read = in_cache(world), []
    monkeypatch.setattr(hashing, "digest_of", lambda path, *_: read.append(path))
    merge(world, reversible=True)
    base = manifest(world / "out")["base"]
    files = {path.name: path.resolve().name for path in snapshot.glob("*.safetensors")}
    assert read == []
    assert sorted(base["digests_from_cache"]) == sorted(files)
    assert {name: f"sha256:{digest}" for name, digest in files.items()}.items() <= base["digests"].items()
    assert base["digests"]["config.json"].startswith("blake3:")
    monkeypatch.undo()
    assert veneer.verify(world / "out", world / "adapter", world / "base", logits=False).passed
    veneer.unmerge(world / "out", out=world / "back")


def test_a_blob_that_is_not_what_it_is_named_is_found(world: Path) -> None:
    file = next(in_cache(world).glob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file.resolve(), metadata={"format": "pt"})
    merge(world, reversible=True)
    report = veneer.verify(world / "out", world / "adapter", world / "base", logits=False)
    assert (report.passed, report.different) == (False, [])
    assert [Path(path).name for path in report.altered] == [file.name]
    with pytest.raises(MergeError, match="is not what the manifest records"):
        veneer.unmerge(world / "out", out=world / "back")


def test_a_manifest_of_version_1_is_read(world: Path) -> None:
    merge(world, reversible=True)
    values = manifest(world / "out")
    for part, folder in (("base", world / "base"), ("outputs", world / "out")):
        names = values[part].pop("digests")
        values[part]["sha256"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (world / "out" / "merge_manifest.json").write_text(json.dumps({**values, "manifest_version": 1}))
    assert veneer.verify(world / "out", world / "adapter", world / "base", logits=False).passed
    veneer.unmerge(world / "out", out=world / "back")
    merge(world, overwrite=True)
    values["base"]["sha256"]["config.json"] = None
    (world / "out" / "merge_manifest.json").write_text(json.dumps({**values, "manifest_version": 1}))
    with pytest.raises(CorruptFileError, match="is not what a merge writes there"):
        veneer.unmerge(world / "out", out=world / "again", base=world / "base")


def test_a_change_that_rounding_eats_is_warned_about(world: Path) -> None:
    tensors = load_file(world / "adapter" / "adapter_model.safetensors")
    small = {key: tensor * 0.03 for key, tensor in tensors.items()}
    save_file(small, world / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    report = merge(world)
    [warning] = report.warnings
    assert "--dtype float32" in warning
    assert "--rounding stochastic" in warning
    assert report.survives < 0.9
    assert merge(world, "wide", dtype="float32").warnings == []


def test_to_float32_nothing_is_rounded(world: Path) -> None:
    report = merge(world, dtype="float32")
    assert (report.survives, report.dtype) == (1.0, "float32")
    before, after = weights(world / "base"), weights(world / "out")
    for name, change in delta(world).items():
        assert gap(after[name], before[name].double() + change) < 1e-6
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert json.loads((world / "out" / "config.json").read_text())["dtype"] == "float32"


def test_from_float32_to_bfloat16_is_rounded_once(world: Path) -> None:
    merge(world, "wide", dtype="float32")
    shutil.move(world / "wide", world / "base32")
    veneer.merge(world / "other", world / "base32", out=world / "out", dtype="bfloat16")
    wide, after = weights(world / "base32"), weights(world / "out")
    for name, change in delta(world, "other").items():
        exact = (wide[name].double() + change).to(torch.bfloat16)
        assert (after[name] == exact).double().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_on_average(dtype: torch.dtype) -> None:
    values = torch.linspace(-3, 3, 50).repeat(4000, 1)
    rounded = Rounding("stochastic", 3).of("x")(values, dtype)
    near, step = values.to(dtype), torch.finfo(dtype).eps * 4
    assert torch.equal(rounded, Rounding("stochastic", 3).of("x")(values, dtype))
    assert not torch.equal(rounded, Rounding("stochastic", 4).of("x")(values, dtype))
    assert float((rounded.float() - values).abs().max()) < step
    bias = (rounded.float().mean(0) - values[0]).abs()
    assert float(bias.max()) < step / 25 < float((near[0].float() - values[0]).abs().max())


def test_stochastic_rounding_keeps_what_nearest_drops(world: Path) -> None:
    tensors = load_file(world / "adapter" / "adapter_model.safetensors")
    small = {key: tensor * 0.02 for key, tensor in tensors.items()}
    save_file(small, world / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    merge(world, "near")
    merge(world, "random", rounding="stochastic", seed=1)
    merge(world, "again", rounding="stochastic", seed=1)
    before, near, chance = (weights(world / name) for name in ("base", "near", "random"))
    name, change = max(delta(world).items(), key=lambda item: item[1].numel())
    kept = [(float(((w[name].double() - before[name]) * change).sum() / change.square().sum())) for w in (near, chance)]
    assert abs(kept[1] - 1) < 0.35
    assert not torch.equal(near[name], chance[name])
    assert all(torch.equal(weights(world / "again")[n], t) for n, t in chance.items())
    with pytest.raises(ConfigError, match="rounding='up'"):
        merge(world, "up", rounding="up")


def test_several_with_weights(world: Path) -> None:
    merge(world, adapter={world / "adapter": 0.7, world / "other": -0.3}, dtype="float32")
    before, after, one, two = weights(world / "base"), weights(world / "out"), delta(world), delta(world, "other")
    for name in one:
        assert gap(after[name], before[name].double() + 0.7 * one[name] - 0.3 * two[name]) < 1e-5
    both = veneer.merge([world / "adapter", world / "other"], world / "base", out=world / "both", dtype="float32")
    model = veneer.load(world / "adapter", base=world / "base", dtype=torch.float32)
    model.load_adapter(world / "other", adapter_name="other")
    model.set_adapter(["default", "other"])
    assert gap(logits(veneer.load(world / "both"), inputs("llama")), logits(model, inputs("llama"))) < 1e-5
    assert " + " in both.adapter


def test_a_weight_that_has_no_meaning_is_refused(world: Path) -> None:
    saved(world / "dora", use_dora=True)
    saved(world / "whole", modules_to_save=["lm_head"])
    with pytest.raises(MergeError, match="is no sum"):
        merge(world, adapter={world / "dora": 0.5})
    with pytest.raises(MergeError, match="brings lm_head whole"):
        merge(world, adapter={world / "whole": 0.5})
    merge(world, adapter={world / "dora": 1.0, world / "whole": 1.0})
    shutil.copytree(world / "whole", world / "whole2")
    with pytest.raises(AdapterError, match="both bring"):
        merge(world, "two", adapter=[world / "whole", world / "whole2"])
    assert not (world / "two").exists()


def test_a_merge_passes_its_verification(world: Path) -> None:
    merge(world)
    report = veneer.verify(world / "out", world / "adapter", world / "base")
    assert report.passed
    assert report.tensors == len(weights(world / "out"))
    assert report.answers is not None
    assert report.answers.kl < 0.02
    assert report.answers.max_drift > 0
    assert veneer.verify(world / "out", logits=False, sample=3).tensors < report.tensors
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"rounding": "stochastic", "seed": 7}, {"dtype": "float16"}])
def test_it_is_done_again_as_it_was(world: Path, options: dict[str, Any]) -> None:
    merge(world, adapter={world / "adapter": 0.5, world / "other": 2.0}, max_shard_size="10KB", **options)
    report = veneer.verify(world / "out")
    assert report.passed
    assert report.answers is None
    assert "no unmerged form" in report.notes[0]


def test_one_changed_bit_is_found(world: Path) -> None:
    merge(world, max_shard_size="1GB")
    path = world / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    report = veneer.verify(world / "out", logits=False)
    assert not report.passed
    assert (len(report.different), report.altered) == (1, ["model.safetensors"])


def test_another_adapter_does_not_pass(world: Path) -> None:
    merge(world)
    report = veneer.verify(world / "out", world / "other", world / "base")
    assert not report.passed
    assert set(report.different) == set(delta(world))
    assert report.answers is not None
    assert report.answers.kl > 0.02
    with pytest.raises(MergeError, match="2 adapters are given, and 1 were merged"):
        veneer.verify(world / "out", [world / "adapter", world / "other"])
    with pytest.raises(IncompleteCheckpointError, match="merge_manifest"):
        veneer.verify(world / "base")


# -- and back ----------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "1GB"}, {"dtype": "float32"}, {"max_shard_size": "10KB"}])
def test_a_reversible_merge_gives_the_base_back(world: Path, options: dict[str, Any]) -> None:
    (world / "base" / "tokenizer.json").write_text("{}")
    (world / "adapter" / "tokenizer.json").write_text('{"own": 1}')
    merge(world, reversible=True, **options)
    before = content(world / "base")
    shutil.move(world / "base", world / "gone")
    report = veneer.unmerge(world / "out", out=world / "back")
    assert content(world / "back") == before
    assert "delta" in report.source
    assert veneer.verify(world / "out", world / "adapter", world / "gone", logits=False).passed


def test_the_base_itself_is_checked(world: Path) -> None:
    merge(world)
    with pytest.raises(MergeError, match="not merged with --reversible"):
        veneer.unmerge(world / "out", out=world / "back")
    veneer.unmerge(world / "out", out=world / "back", base=world / "base")
    assert content(world / "back") == content(world / "base")
    shard = max((world / "base").glob("model-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(MergeError, match="not what the manifest records"):
        veneer.unmerge(world / "out", out=world / "other-back", base=world / "base")
    assert not (world / "other-back").exists()


def test_a_damaged_delta_is_found(world: Path) -> None:
    merge(world, reversible=True)
    archive = max((world / "out" / "merge_delta").glob("model*.zip"), key=lambda path: path.stat().st_size)
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(veneer.VeneerError, match="damaged"):
        veneer.unmerge(world / "out", out=world / "back")
    assert not (world / "back").exists()
