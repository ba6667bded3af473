"""X-LoRA: LoRA adapters that a classifier weighs at each token. peft is the oracle."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from tests.methods.test_arrow import saved_loras
from tests.models import build, gap, inputs, logits
from veneer.errors import AdapterError, BindError, ConfigError, DuplicateAdapterError, MergeError, UnsupportedError

WEIGHTS = "adapter_model.safetensors"
CLASSIFIER = "internal_xlora_classifier"
OPTIONS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "layerwise, deep": {"layerwise_scalings": True, "xlora_depth": 3, "xlora_size": 16},
    "no dropout": {"xlora_depth": 2, "xlora_size": 16, "xlora_dropout_p": 0.0, "softmax_temperature": 0.5},
    "top": {"top_k_lora": 2, "global_scaling_weight": 1.5},
    "top, softmax": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "pass": {"scaling_pass_value": 0.4},
}


def _experts(folder: Path, arch: str = "llama") -> dict[str, str]:
    """Three LoRAs by their names; in Llama the third is on other layers, an embedding among them."""
    gpt2 = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    first, last = (gpt2, gpt2) if arch == "gpt2" else ({}, {"target_modules": ["q_proj", "embed_tokens"]})
    paths = [*saved_loras(folder / "a", arch, 2, **first), *saved_loras(folder / "b", arch, 1, **last)]
    return {str(index): str(path) for index, path in enumerate(paths)}


def _bare(arch: str = "llama") -> Any:
    model: Any = build(arch)
    model.config.use_cache = False
    return model


def _scrambled(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if CLASSIFIER in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.eval()


def peers(experts: dict[str, str], arch: str = "llama", **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=experts, **options)
        return _scrambled(peft.get_peft_model(_bare(arch), config))


def saved_by_peft(model: Any, folder: Path) -> Path:
    """What peft saves, with the layers of the classifier that it takes for parts of an expert "0" and leaves out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    whole = {key: tensor.clone() for key, tensor in model.state_dict().items() if CLASSIFIER in key}
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.mark.oracle
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_output_is_as_in_peft_both_ways(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = peers(_experts(tmp_path), **options)
    wanted, base = logits(theirs, inputs("llama")), logits(build("llama"), inputs("llama"))
    assert gap(wanted, base) > 0.02
    model: Any = veneer.PeftModel.from_pretrained(build("llama"), saved_by_peft(theirs, tmp_path / "theirs"))
    assert model.active_adapters == ["default"]
    assert gap(logits(model, inputs("llama")), wanted) < 1e-5
    assert gap(model.get_latest_scalings(), theirs.get_latest_scalings()) < 1e-5
    model.save_pretrained(tmp_path / "ours")
    own, kept = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs"))
    assert own.keys() == kept.keys()
    assert all(own[key].numpy().tobytes() == kept[key].numpy().tobytes() for key in kept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(_bare(), str(tmp_path / "ours")).eval()
    assert gap(logits(again, inputs("llama")), wanted) < 1e-5


@pytest.mark.oracle
def test_generation_with_a_cache_is_as_in_peft_without(tmp_path: Path) -> None:
    theirs = peers(_experts(tmp_path))
    model: Any = veneer.PeftModel.from_pretrained(build("llama"), saved_by_peft(theirs, tmp_path / "theirs"))
    batch = inputs("llama")
    batch["input_ids"][0, :3], batch["attention_mask"][0, :3] = 0, 0
    fixed: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = theirs.generate(**batch, **fixed)
    assert torch.equal(model.generate(**batch, **fixed), wanted)
    assert torch.equal(model.generate(**batch, **fixed, use_cache=False), wanted)
    beams = [model.generate(**batch, **fixed, num_beams=2, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)
    first = model(batch["input_ids"][:, :4])
    rest = model(batch["input_ids"][:, 4:], past_key_values=first.past_key_values).logits
    assert gap(rest, model(batch["input_ids"]).logits[:, 4:]) < 1e-5


def _ours(folder: Path, arch: str = "llama", **options: Any) -> Any:
    config = veneer.XLoraConfig(task_type="CAUSAL_LM", adapters=_experts(folder, arch), **options)
    return _scrambled(veneer.get_peft_model(build(arch), config, seed=1))


def test_gpt2_generates_with_a_cache_as_without(tmp_path: Path) -> None:
    # peft loads no LoRA of it: it looks for names that begin with "model.".
    model, batch = _ours(tmp_path, "gpt2"), inputs("gpt2")
    assert gap(logits(model, batch), logits(build("gpt2"), batch)) > 0.02
    fixed: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*[model.generate(**batch, **fixed, use_cache=cached) for cached in (True, False)])


def test_a_new_one_trains_its_classifier_alone_and_is_saved(tmp_path: Path) -> None:
    model = _ours(tmp_path, layerwise_scalings=True, xlora_depth=2, xlora_size=8, xlora_dropout_p=0.0)
    assert model.peft_config["default"].hidden_size == 32
    batch = {**inputs("llama"), "labels": inputs("llama")["input_ids"]}
    model.train()
    losses = []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(5):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        assert all((CLASSIFIER in name) == (p.grad is not None) for name, p in model.named_parameters())
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[1:]) < losses[0]
    expected = logits(model.eval(), inputs("llama"))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        logits(veneer.PeftModel.from_pretrained(build("llama"), tmp_path / "saved"), inputs("llama")), expected
    )
    assert gap(logits(copy.deepcopy(model), inputs("llama")), expected) < 1e-6
    # Alone in a folder it finds them where its config says.
    model.save_pretrained(tmp_path / "alone", selected_adapters=["default"])
    again = veneer.PeftModel.from_pretrained(build("llama"), tmp_path / "alone", is_trainable=True)
    assert torch.equal(logits(again.eval(), inputs("llama")), expected)
    both = _ours(tmp_path / "trained", use_trainable_adapters=True)
    both(**batch).loss.backward()
    assert sum(p.grad is not None for name, p in both.named_parameters() if "lora_A" in name) > 3


def test_disabled_beside_others_and_in_rows(tmp_path: Path) -> None:
    model, batch = _ours(tmp_path), inputs("llama")
    mixed, base = logits(model, batch), logits(build("llama").requires_grad_(False), batch)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), base)
    with model.using("1"):
        alone = logits(model, batch)
    rows = logits(model, batch, adapter_names=["1", "default"])
    assert gap(rows[0], alone[0]) < 1e-5
    assert gap(rows[1], mixed[1]) < 1e-5
    model.set_adapter(["default", "1"])
    assert gap(logits(model, batch), mixed) > 0.01
    assert torch.equal(logits(model.unload(), batch), base)


def test_the_scalings_can_be_read_and_steered(tmp_path: Path) -> None:
    model, batch = _ours(tmp_path), inputs("llama")
    assert model.get_latest_scalings() is None
    model.enable_scalings_logging()
    before = logits(model, batch)
    logits(model, {"input_ids": batch["input_ids"][:, :3]})
    model.disable_scalings_logging()
    logits(model, batch)
    assert [tuple(scalings.shape) for scalings in model.get_scalings_log()] == [(2, 7, 5, 3), (2, 3, 5, 3)]
    assert {length: places for length, (places, _) in model.get_bucketed_scalings_log().items()} == {7: [0], 3: [1]}
    assert torch.allclose(model.get_latest_scalings().sum(-1), torch.ones(2, 7, 5))
    model.clear_scalings_log()
    assert model.get_scalings_log() == []
    model.set_topk_lora(1)
    top = logits(model, batch)
    assert gap(top, before) > 1e-3
    model.set_topk_lora(None)
    model.set_scaling_pass_value(None)
    assert model.peft_config["default"].scaling_pass_value == pytest.approx(1 / 3)
    assert gap(logits(model, batch), before) > 1e-3
    model.set_global_scaling_weight(0.0)
    assert model.get_global_scaling_weight() == 0
    assert gap(logits(model, batch), logits(build("llama"), batch)) < 1e-5
    with pytest.raises(AdapterError, match="top_k_lora"):
        model.set_topk_lora(0)


def test_what_cannot_be_is_refused_with_a_mend(tmp_path: Path) -> None:
    experts = _experts(tmp_path)
    with pytest.raises(ConfigError, match="adapters is empty"):
        veneer.get_peft_model(build("llama"), veneer.XLoraConfig())
    with pytest.raises(ConfigError, match="xlora_depth"):
        veneer.XLoraConfig(adapters=experts, xlora_depth=0)
    model = veneer.get_peft_model(build("llama"), veneer.XLoraConfig(adapters=experts), seed=1)
    with pytest.raises(MergeError, match="no weight"):
        model.merge_and_unload()
    with pytest.raises(AdapterError, match="mixes '1'"):
        model.delete_adapter("1")
    with pytest.raises(DuplicateAdapterError):
        model.add_adapter("second", veneer.XLoraConfig(adapters={"0": experts["1"]}))
    model.save_pretrained(tmp_path / "saved")
    whole = load_file(tmp_path / "saved" / WEIGHTS)
    save_file({key: t for key, t in whole.items() if "weight" in key}, tmp_path / "saved" / WEIGHTS)
    other = veneer.get_peft_model(build("llama"), veneer.LoraConfig(target_modules=["q_proj"]), adapter_name="lora")
    with pytest.raises(BindError, match="missing"):
        other.load_adapter(tmp_path / "saved")
    assert list(other.peft_config) == ["lora"]
    assert other.active_adapters == ["lora"]
    with pytest.raises(AdapterError, match="No X-LoRA"):
        other.get_latest_scalings()
    dora = {str(i): str(path) for i, path in enumerate(saved_loras(tmp_path / "d", count=2, use_dora=True))}
    with pytest.raises(UnsupportedError, match="product of two matrices"):
        veneer.get_peft_model(build("llama"), veneer.XLoraConfig(adapters=dora))
    t5 = saved_loras(tmp_path / "t5", "t5", 1, target_modules=["q", "v"])
    with pytest.raises(UnsupportedError, match="single stack"):
        veneer.get_peft_model(build("t5"), veneer.XLoraConfig(adapters={"0": str(t5[0])}))
