"""Merges from disk to disk into bases of bitsandbytes: the bits of the merge in memory, from tensor to tensor."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import config, enlarge
from veneer.errors import CorruptFileError, MergeError, UnsupportedError, VeneerError

pytest.importorskip("bitsandbytes")

FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4 in bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
    "8 bits": {"load_in_8bit": True},
}
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


@pytest.fixture(scope="module", autouse=True)
def portable_layout() -> Iterator[None]:
    """Keep to layouts that do not depend on the processor: those need larger layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
    """Return the folders of a base in a form and of an adapter for it, each made once."""
    root = tmp_path_factory.mktemp("packed")

    def folders(form: str, arch: str = "llama", dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
        base, adapter = root / f"{arch} {form} {dtype}", root / f"adapter {arch}"
        if not base.exists():
            build(arch).to(dtype).save_pretrained(root / arch)  # type: ignore[operator]
            how = tf.BitsAndBytesConfig(**FORMS[form])
            tf.AutoModelForCausalLM.from_pretrained(root / arch, quantization_config=how).save_pretrained(base)
            model = veneer.get_peft_model(build(arch), config(target_modules=TARGETS[arch]), seed=1)
            enlarge(model, "default")
            model.save_pretrained(adapter)
        return base, adapter

    return folders


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("form", FORMS)
def test_the_bits_are_those_of_the_merge_in_memory(form: str, bases: Any, tmp_path: Path) -> None:
    base, adapter = bases(form)
    report = veneer.merge(adapter, base, out=tmp_path / "out", dequantize=True)
    memory = veneer.load(adapter, base=base).merge_and_unload(into="dequantized")
    found, state = weights(tmp_path / "out"), memory.state_dict()
    assert found.keys() == state.keys()
    assert not [name for name in state if not torch.equal(found[name], state[name])]
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert report.dtype == "bfloat16"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    model, told = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    without = tf.AutoModelForCausalLM.from_pretrained(base)
    assert gap(logits(model.eval(), inputs("llama")), logits(without.eval(), inputs("llama"))) > 0.02


def test_another_dtype_rounds_the_dequantised_sum_once(bases: Any, tmp_path: Path) -> None:
    base, adapter = bases("nf4 nested")
    for dtype in ("float32", "bfloat16"):
        veneer.merge(adapter, base, out=tmp_path / dtype, dequantize=True, dtype=dtype)
    wide, narrow = weights(tmp_path / "float32"), weights(tmp_path / "bfloat16")
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    assert all(torch.equal(wide[name].bfloat16(), narrow[name]) for name in wide)
    assert any(not torch.equal(wide[name], narrow[name].float()) for name in wide)


@pytest.mark.parametrize("form", ["nf4", "8 bits"])
def test_it_is_verified_and_undone(form: str, bases: Any, tmp_path: Path) -> None:
    base, adapter = bases(form)
    veneer.merge(adapter, base, out=tmp_path / "out", dequantize=True, reversible=True)
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert manifest["options"]["dequantize"]
    assert manifest["summary"]["changed_tensors"] == 4
    report = veneer.verify(tmp_path / "out", adapter=adapter, base=base)
    assert report.passed, report
    veneer.unmerge(tmp_path / "out", out=tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("form", ["nf4", "8 bits"])
def test_layers_that_are_quantised_the_other_way_round(form: str, bases: Any, tmp_path: Path) -> None:
    base, adapter = bases(form, "gpt2", torch.float32)
    report = veneer.merge(adapter, base, out=tmp_path / "out", dequantize=True)
    assert report.dtype == json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert {n: t.shape for n, t in weights(tmp_path / "out").items()}.items() <= {
        name: tensor.shape for name, tensor in build("gpt2").state_dict().items()
    }.items()
    veneer.load(adapter, base=base).merge_and_unload(into="dequantized").save_pretrained(tmp_path / "memory")
    memory, found = weights(tmp_path / "memory"), weights(tmp_path / "out")
    assert found.keys() == memory.keys()
    assert not [name for name in memory if not torch.equal(found[name], memory[name])]


def test_it_asks_first(bases: Any, tmp_path: Path) -> None:
    base, adapter = bases("nf4")
    with pytest.raises(MergeError, match=r"quantised \(bitsandbytes\)") as caught:
        veneer.merge(adapter, base, out=tmp_path / "out")
    assert "--dequantize" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_it_needs_bitsandbytes(bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = bases("nf4")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "bitsandbytes" else real(n))
    with pytest.raises(UnsupportedError, match="not installed") as caught:
        veneer.merge(adapter, base, out=tmp_path / "out", dequantize=True)
    assert "pip install bitsandbytes" in str(caught.value.hint)
    assert "pip install '.[quant]'" in str(caught.value.hint)


FIRST = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{FIRST}.quant_state.bitsandbytes__nf4"
DAMAGES: dict[str, tuple[str, str, Callable[[dict[str, Tensor]], object], type[VeneerError]]] = {
    "no scales": ("nf4", "absmax", lambda w: w.pop(f"{FIRST}.absmax"), CorruptFileError),
    "few scales": ("nf4", "absmax", lambda w: w.update({f"{FIRST}.absmax": torch.ones(1)}), CorruptFileError),
    "no values": ("nf4", "q_proj", lambda w: w.pop(FIRST), CorruptFileError),
    "no JSON": ("nf4", "quant_state", lambda w: w.update({STATE: w[STATE][:-1].clone()}), CorruptFileError),
    "another code": (
        "nf4",
        "quant_map",
        lambda w: w.update({f"{FIRST}.quant_map": w[f"{FIRST}.quant_map"] * 2}),
        UnsupportedError,
    ),
    "no code": ("nf4 nested", "nested_quant_map", lambda w: w.pop(f"{FIRST}.nested_quant_map"), CorruptFileError),
    "rows": ("8 bits", "SCB", lambda w: w.update({FIRST.replace("weight", "SCB"): torch.ones(3)}), CorruptFileError),
    "GPU's layout": (
        "8 bits",
        "weight_format",
        lambda w: w.update({f"{FIRST}_format": torch.tensor(2, dtype=torch.uint8)}),
        UnsupportedError,
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_named(damage: str, bases: Any, tmp_path: Path) -> None:
    form, word, change, error = DAMAGES[damage]
    base, adapter = bases(form)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = weights(base)
    change(tensors)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=word):
        veneer.merge(adapter, tmp_path / "base", out=tmp_path / "out", dequantize=True)
    assert not (tmp_path / "out").exists()
