"""Merges from disk to disk of older layouts, of other vocabularies, and into quantised bases."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from tests.checkpoints.test_older_layouts import OLD, Old, moe, old_experts, seeing
from tests.models import build, gap, inputs, logits
from tests.oracle.peer import scramble
from tests.random_adapters import config, enlarge, saved, saved_base
from veneer.errors import BaseModelError, MergeError, UnsupportedError

CLOSE = 1e-5
BATCH = inputs("llama")


def read(folder: Path) -> Tensor:
    """Return the logits of a merged folder, which transformers loads with no tensor missing or spare."""
    model, told = tf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    return logits(model.eval(), BATCH)


def made(folder: Path, base: nn.Module, seed: int = 1, **options: Any) -> Tensor:
    """Save an adapter of ``base`` in ``folder``, and return its logits."""
    model = veneer.get_peft_model(base, config(**options), seed=seed).eval()
    enlarge(model, "default", seed)
    model.save_pretrained(folder)
    return logits(model, BATCH)


# -- older layouts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OLD)
def test_the_lora_of_single_experts(kind: str, tmp_path: Path) -> None:
    by_hand: Any = moe(kind)
    base: Any = moe(kind)
    base.save_pretrained(tmp_path / "base")
    folder = old_experts(kind, by_hand, OLD[kind][1], (0, 1, 2)).save(tmp_path / "old")
    report = veneer.merge(folder, tmp_path / "base", out=tmp_path / "out")
    assert gap(read(tmp_path / "out"), logits(by_hand, BATCH)) < CLOSE
    assert gap(logits(by_hand, BATCH), logits(base, BATCH)) > 0.02
    assert any("experts" in warning for warning in report.warnings)


def test_moved_prefixes_of_a_vision_language_model(tmp_path: Path) -> None:
    base: Any = seeing()
    base.save_pretrained(tmp_path / "base")
    old = Old(target_modules=["q_proj"], task_type=None)
    for index in range(2):
        old.add(f"language_model.model.layers.{index}.self_attn.q_proj", 32, 32)
        old.add(f"vision_tower.vision_model.encoder.layers.{index}.self_attn.q_proj", 32, 32)
    folder = old.save(tmp_path / "old")
    report = veneer.merge(folder, tmp_path / "base", out=tmp_path / "out")
    assert any("language_model.model -> model.language_model" in warning for warning in report.warnings)
    batch = {
        "input_ids": torch.tensor([[5, 99, 99, 99, 99, 7, 8]]),
        "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)),
    }
    expected = logits(veneer.load(folder, base=tmp_path / "base"), batch)
    assert gap(logits(veneer.load(tmp_path / "out"), batch), expected) < CLOSE
    assert gap(logits(base, batch), expected) > 0.02


# -- vocabularies ----------------------------------------------------------------------------------------------

VOCABULARIES: dict[str, dict[str, Any]] = {
    "saved whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "fewer tokens": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_a_vocabulary_that_the_adapter_brings(kind: str, tmp_path: Path) -> None:
    size = 96 if kind == "fewer tokens" else 107
    folder = saved_base(tmp_path / "base")
    base = tf.AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(size, mean_resizing=False)
    batch = {key: value.clamp(max=size - 1) for key, value in BATCH.items()}
    model = veneer.get_peft_model(base, config(**VOCABULARIES[kind]), seed=1).eval()
    enlarge(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    report = veneer.merge(tmp_path / "adapter", folder, out=tmp_path / "out", reversible=True)
    assert any(f"resized to {size} tokens" in warning for warning in report.warnings)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == size
    merged, told = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["mismatched_keys"]
    assert gap(logits(merged.eval(), batch), logits(model, batch)) < CLOSE
    assert veneer.verify(tmp_path / "out", adapter=tmp_path / "adapter", base=folder).passed
    veneer.unmerge(tmp_path / "out", out=tmp_path / "back")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.oracle
def test_the_rows_that_peft_saves_beside_a_lora(tmp_path: Path) -> None:
    folder = saved_base(tmp_path / "base")
    base = tf.AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(107, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = scramble(peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")))
        model.save_pretrained(tmp_path / "adapter")
    veneer.merge(tmp_path / "adapter", folder, out=tmp_path / "out")
    assert gap(read(tmp_path / "out"), logits(model.eval(), BATCH)) < CLOSE


def test_new_tokens_beside_a_tied_head(tmp_path: Path) -> None:
    model: Any = build("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "base")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(101, mean_resizing=False)
    expected = made(tmp_path / "adapter", base, trainable_token_indices=[7, 99, 100])
    report = veneer.merge(tmp_path / "adapter", tmp_path / "base", out=tmp_path / "out")
    assert report.untied == []
    assert gap(read(tmp_path / "out"), expected) < CLOSE


# -- ties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_ends_saved_whole_part_a_tie(whole: list[str], tmp_path: Path) -> None:
    model: Any = build("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "base")
    expected = made(
        tmp_path / "adapter", tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), modules_to_save=whole
    )
    report = veneer.merge(tmp_path / "adapter", tmp_path / "base", out=tmp_path / "out")
    assert len(report.untied) == 2
    assert gap(read(tmp_path / "out"), expected) < CLOSE


# -- several adapters on fused experts -------------------------------------------------------------------------


def test_two_adapters_of_fused_experts_with_weights(tmp_path: Path) -> None:
    base: Any = moe("mixtral")
    base.save_pretrained(tmp_path / "base")
    experts = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    for seed in (1, 2):
        made(tmp_path / str(seed), tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), seed, r=2, **experts)
    model = veneer.load(tmp_path / "1", base=tmp_path / "base", adapter_name="a")
    model.load_adapter(tmp_path / "2", adapter_name="b")
    for weights, out in (((1.0, 1.0), "sum"), ((0.7, -0.3), "weighted")):
        model.add_weighted_adapter(["a", "b"], list(weights), out, combination_type="cat")
        model.set_adapter(out)
        wanted = {tmp_path / "1": weights[0], tmp_path / "2": weights[1]}
        veneer.merge(wanted, tmp_path / "base", out=tmp_path / out)
        assert gap(read(tmp_path / out), logits(model, BATCH)) < CLOSE


# -- quantised bases -------------------------------------------------------------------------------------------


def fp8_base(folder: Path, block: int | None) -> nn.Module:
    """Store a model's layers in float8 with scales (of square blocks, or one for all); the model of those values."""
    model: Any = build("llama")
    model.save_pretrained(folder)
    weights: dict[str, Tensor] = load_file(folder / "model.safetensors")
    values = dict(weights)
    for name, weight in list(weights.items()):
        if "proj" not in name:
            continue
        size = block or max(weight.shape)
        rows = [chunk.split(size, 1) for chunk in weight.split(size)]
        scales = torch.stack([torch.stack([part.abs().max() / 448 for part in row]) for row in rows])
        spread = scales.repeat_interleave(size, 0)[: weight.shape[0]].repeat_interleave(size, 1)[:, : weight.shape[1]]
        weights[name] = (weight / spread).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scales if block else scales.reshape(())
        values[name] = weights[name].float() * spread
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    quantized(folder, {"quant_method": "fp8", "weight_block_size": [block, block] if block else None})
    model.load_state_dict(values)
    return model


def quantized(folder: Path, how: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": how}))


@pytest.mark.parametrize("block", [16, None], ids=["blocks", "one scale"])
def test_a_base_in_float8(block: int | None, tmp_path: Path) -> None:
    plain = fp8_base(tmp_path / "base", block)
    expected = made(tmp_path / "adapter", plain)
    with pytest.raises(MergeError, match=r"quantised \(fp8\)") as caught:
        veneer.merge(tmp_path / "adapter", tmp_path / "base", out=tmp_path / "out")
    assert "--dequantize" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    for dtype, close in (("float32", CLOSE), ("auto", 0.05)):
        out = tmp_path / dtype
        veneer.merge(tmp_path / "adapter", tmp_path / "base", out=out, dequantize=True, dtype=dtype)
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        assert not [name for name in load_file(out / "model.safetensors") if "scale" in name]
        assert gap(read(out), expected) < close
        assert veneer.verify(out, adapter=tmp_path / "adapter", base=tmp_path / "base").passed


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("torchao", 'into="dequantized"'),
        ("hqq", 'into="dequantized"'),
        ("gptq", "original base"),
        ("awq", "original base"),
    ],
)
def test_a_base_in_another_form_says_how_to_go_on(method: str, way: str, tmp_path: Path) -> None:
    folder, adapter = saved_base(tmp_path / "base"), saved(tmp_path / "adapter")
    quantized(folder, {"quant_method": method})
    with pytest.raises(MergeError, match=rf"quantised \({method}\)"):
        veneer.merge(adapter, folder, out=tmp_path / "out")
    with pytest.raises(UnsupportedError, match=f"quantised as {method}") as caught:
        veneer.merge(adapter, folder, out=tmp_path / "out", dequantize=True)
    assert way in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_a_base_in_gguf_says_how_to_go_on(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tiny.Q8_0.gguf").write_bytes(b"GGUF")
    for run in (lambda: veneer.load(adapter, base=tmp_path / "base"), _merging(adapter, tmp_path / "base")):
        with pytest.raises(BaseModelError, match=r"as GGUF \(tiny.Q8_0.gguf\)") as caught:
            run()
        assert 'gguf_file="tiny.Q8_0.gguf"' in str(caught.value.hint)


def _merging(adapter: Path, base: Path) -> Callable[[], Any]:
    return lambda: veneer.merge(adapter, base, out=adapter.parent / "out")
