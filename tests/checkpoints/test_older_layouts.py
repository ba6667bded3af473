"""Adapters of version 4's layouts on models as version 5 keeps them, against changes worked out by hand."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from tests.models import BLOCKS, LLAMA, TEXT, build, gap, inputs, logits
from tests.random_adapters import CONFIG, WEIGHTS

CLOSE = 1e-5
EXPERTS = 3
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}


def moe(kind: str) -> nn.Module:
    """A tiny mixture of experts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "mixtral":
            model = tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, **SIZES, num_local_experts=EXPERTS))
        else:
            sizes = {"num_experts": EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 8}
            model = tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**TEXT, **SIZES, **sizes))
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


# Family -> the names of a block, of its router, and of gate, up and down in version 4.
OLD = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen2_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


class Old:
    """An adapter in version 4's layout, made by hand."""

    def __init__(self, **config: Any) -> None:
        self.config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **config}
        self.tensors: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(1)

    def add(self, module: str, out: int, inner: int, r: int = 4, scale: float = 2.0) -> Tensor:
        """Put a LoRA of a module in, and give what it adds to the weight."""
        down = torch.randn(r, inner, generator=self.generator) * 0.3
        up = torch.randn(out, r, generator=self.generator) * 0.3
        self.tensors[f"base_model.model.{module}.lora_A.weight"] = down
        self.tensors[f"base_model.model.{module}.lora_B.weight"] = up
        return scale * up @ down

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(self.config))
        return folder


def old_experts(kind: str, model: nn.Module, names: tuple[str, ...], experts: tuple[int, ...], **config: Any) -> Old:
    """An adapter on the experts, put into ``model`` by hand as well."""
    block, roles = OLD[kind]
    old = Old(target_modules=["q_proj", *names], **config)
    ranks = config.get("rank_pattern", {})
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.weight.data += old.add(f"model.layers.{index}.self_attn.q_proj", 16, 16)
        if kind == "qwen2_moe":  # whose experts for all tokens have the same names, and are modules still
            for name in names:
                shared = getattr(layer.mlp.shared_expert, name)
                shared.weight.data += old.add(f"model.layers.{index}.mlp.shared_expert.{name}", *shared.weight.shape)
        for expert in experts:
            fused = layer.mlp.experts
            for name in names:
                place = f"model.layers.{index}.{block}.experts.{expert}.{name}"
                r = ranks.get(name, 4)
                if name == roles[2]:
                    fused.down_proj.data[expert] += old.add(place, 16, 24, r, 8 / r)
                else:
                    half = slice(0, 24) if name == roles[0] else slice(24, 48)
                    fused.gate_up_proj.data[expert, half] += old.add(place, 24, 16, r, 8 / r)
    return old


@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize("chosen", [(0, 1, 2), (2,), (0, 1), (1,), (0,), (1, 2)])
def test_the_lora_of_single_experts(kind: str, chosen: tuple[int, ...], tmp_path: Path) -> None:
    names = tuple(OLD[kind][1][i] for i in chosen)
    by_hand = moe(kind)
    folder = old_experts(kind, by_hand, names, (0, 1, 2)).save(tmp_path / "old")
    batch = inputs("llama")
    expected = logits(by_hand, batch)
    assert gap(expected, logits(moe(kind), batch)) > 0.02
    model = veneer.PeftModel.from_pretrained(moe(kind), folder)
    assert gap(logits(model, batch), expected) < CLOSE
    assert any("experts" in warning for warning in model.load_report.warnings)
    model.save_pretrained(tmp_path / "new")
    again = veneer.PeftModel.from_pretrained(moe(kind), tmp_path / "new")
    assert not again.load_report.warnings
    assert gap(logits(again, batch), expected) < CLOSE
    assert gap(logits(model.merge_and_unload(), batch), expected) < CLOSE


@pytest.mark.oracle
@pytest.mark.parametrize("kind", OLD)
def test_what_is_saved_is_the_same_in_peft(kind: str, tmp_path: Path) -> None:
    import peft

    by_hand = moe(kind)
    folder = old_experts(kind, by_hand, OLD[kind][1], (0, 1, 2)).save(tmp_path / "old")
    veneer.PeftModel.from_pretrained(moe(kind), folder).save_pretrained(tmp_path / "new")
    with warnings.catch_warnings():
        # It looks for the patterns' names among modules only, and applies them to parameters all the same.
        warnings.simplefilter("ignore", RuntimeWarning)
        theirs = peft.PeftModel.from_pretrained(moe(kind), tmp_path / "new").eval()
    assert gap(logits(theirs, inputs("llama")), logits(by_hand, inputs("llama"))) < CLOSE


def test_only_some_experts_and_other_ranks(tmp_path: Path) -> None:
    by_hand = moe("mixtral")
    patterns = {"rank_pattern": {"w1": 2, "w2": 8}}
    folder = old_experts("mixtral", by_hand, ("w1", "w2", "w3"), (0, 2), **patterns).save(tmp_path)
    model = veneer.PeftModel.from_pretrained(moe("mixtral"), folder)
    assert gap(logits(model, inputs("llama")), logits(by_hand, inputs("llama"))) < CLOSE


def test_with_rslora_and_a_router(tmp_path: Path) -> None:
    by_hand = moe("mixtral")
    old = Old(target_modules=["gate", "w1"], use_rslora=True)
    for index, layer in enumerate(by_hand.model.layers):
        place = f"model.layers.{index}.block_sparse_moe"
        layer.mlp.gate.weight.data += old.add(f"{place}.gate", 3, 16, scale=4.0)
        for expert in range(EXPERTS):
            layer.mlp.experts.gate_up_proj.data[expert, :24] += old.add(
                f"{place}.experts.{expert}.w1", 24, 16, scale=4.0
            )
    model = veneer.PeftModel.from_pretrained(moe("mixtral"), old.save(tmp_path))
    assert gap(logits(model, inputs("llama")), logits(by_hand, inputs("llama"))) < CLOSE
    assert any("routers" in warning for warning in model.load_report.warnings)


def test_a_router_that_kept_its_name(tmp_path: Path) -> None:
    by_hand = moe("qwen2_moe")
    old = Old(target_modules=["gate", "q_proj"])
    for index, layer in enumerate(by_hand.model.layers):
        layer.mlp.gate.weight.data += old.add(f"model.layers.{index}.mlp.gate", 3, 16)
        layer.self_attn.q_proj.weight.data += old.add(f"model.layers.{index}.self_attn.q_proj", 16, 16)
    model = veneer.PeftModel.from_pretrained(moe("qwen2_moe"), old.save(tmp_path))
    assert gap(logits(model, inputs("llama")), logits(by_hand, inputs("llama"))) < CLOSE


def seeing() -> nn.Module:
    """A tiny vision-language model."""
    text = tf.LlamaConfig(**{**LLAMA, "vocab_size": 100})
    vision = tf.CLIPVisionConfig(**BLOCKS, intermediate_size=48, image_size=16, patch_size=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=99)
        model = tf.LlavaForConditionalGeneration(config).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.15)
    return model


@pytest.mark.parametrize("full_names", [False, True])
def test_moved_prefixes_of_a_vision_language_model(full_names: bool, tmp_path: Path) -> None:
    by_hand = seeing()
    text = [f"language_model.model.layers.{index}.self_attn.q_proj" for index in range(2)]
    tower = [f"vision_tower.vision_model.encoder.layers.{index}.self_attn.q_proj" for index in range(2)]
    old = Old(target_modules=[*text, *tower] if full_names else ["q_proj"])
    seen = {name: module for name, module in by_hand.named_modules() if name.endswith("self_attn.q_proj")}
    for index, name in enumerate(text):
        seen[f"model.language_model.layers.{index}.self_attn.q_proj"].weight.data += old.add(name, 32, 32)
    towers = [module for name, module in seen.items() if "vision" in name]
    changes = [old.add(name, 32, 32) for name in tower]
    for module, change in zip(towers, changes, strict=True):
        module.weight.data += change
    model = veneer.PeftModel.from_pretrained(seeing(), old.save(tmp_path / "old"))
    batch = {
        "input_ids": torch.tensor([[5, 99, 99, 99, 99, 7, 8]]),
        "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)),
    }
    assert gap(logits(model, batch), logits(by_hand, batch)) < CLOSE
    assert any("language_model.model -> model.language_model" in w for w in model.load_report.warnings)
    assert model.load_report.adapters[0].tensors_bound == 8
    model.save_pretrained(tmp_path / "new")
    assert not veneer.PeftModel.from_pretrained(seeing(), tmp_path / "new").load_report.warnings


def test_an_adapter_of_the_text_model_fits_the_vision_language_model(tmp_path: Path) -> None:
    """Of these names transformers publishes no rule: they are those of another model class."""
    names = [f"model.layers.{index}.self_attn.q_proj" for index in range(2)]
    by_hand, old = seeing(), Old(target_modules=names)
    for name, layer in zip(names, by_hand.model.language_model.layers, strict=True):
        layer.self_attn.q_proj.weight.data += old.add(name, 32, 32)
    model = veneer.PeftModel.from_pretrained(seeing(), old.save(tmp_path))
    assert gap(logits(model, inputs("llama")), logits(by_hand, inputs("llama"))) < CLOSE
    assert any("model -> model.language_model" in w for w in model.load_report.warnings)


@pytest.mark.parametrize("name", ["bert.layers.0.self_attn.q_proj", "model.layers.7.self_attn.q_proj", "model.q_proj"])
def test_what_only_looks_alike_is_not_taken(name: str, tmp_path: Path) -> None:
    old = Old(target_modules=["q_proj"])
    old.add(name, 32, 32)
    with pytest.raises(veneer.BindError, match="the model has no"):
        veneer.PeftModel.from_pretrained(build("llama"), old.save(tmp_path))


def test_an_expert_with_half_a_lora_is_a_problem(tmp_path: Path) -> None:
    folder = old_experts("mixtral", moe("mixtral"), ("w2",), (0, 1, 2)).save(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    del tensors["base_model.model.model.layers.0.block_sparse_moe.experts.1.w2.lora_B.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(veneer.BindError, match=r"experts\.0\.w2"):
        veneer.PeftModel.from_pretrained(moe("mixtral"), folder)


def test_two_adapters_on_the_same_experts(tmp_path: Path) -> None:
    """Which peft refuses."""
    both = moe("mixtral")
    first = old_experts("mixtral", both, ("w1", "w2", "w3"), (0, 1, 2)).save(tmp_path / "first")
    second = old_experts("mixtral", both, ("w2", "w3"), (1,), rank_pattern={"w2": 2}).save(tmp_path / "second")
    model = veneer.PeftModel.from_pretrained(moe("mixtral"), first, adapter_name="first")
    alone = logits(model, inputs("llama"))
    model.load_adapter(second, adapter_name="second")
    model.set_adapter("second")
    other = logits(model, inputs("llama"))
    mixed = logits(model, inputs("llama"), adapter_names=["first", "second"])
    assert gap(mixed[0], alone[0]) < CLOSE
    assert gap(mixed[1], other[1]) < CLOSE
    model.set_adapter(["first", "second"])
    expected = logits(both, inputs("llama"))
    assert gap(expected, alone) > 0.02
    assert gap(logits(model, inputs("llama")), expected) < CLOSE
    assert gap(logits(model.merge_and_unload(), inputs("llama")), expected) < CLOSE
