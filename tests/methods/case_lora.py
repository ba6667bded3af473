from __future__ import annotations

from typing import Any

from tests.methods.case import Case

_LLAMA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
_BERT = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "intermediate.dense"]}
_CONV = {"r": 3, "lora_alpha": 8, "target_modules": ["embed", "conv1", "conv2", "point", "first"]}


def _blocks(a: list[str], b: list[str], **more: Any) -> dict[str, Any]:
    return {"use_bdlora": {"target_modules_bd_a": a, "target_modules_bd_b": b, "nblocks": 2, **more}}


_KASA = {"kasa_config": {"beta": 1e-3, "gamma": 1e-2}}
_MONTE = {"monteclora_config": {"num_samples": 3, "buffer_size": 2}}
CASES = [
    Case("llama", "llama", "LoraConfig", {**_LLAMA, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}}),
    Case("rank-stabilised", "llama", "LoraConfig", {**_LLAMA, "use_rslora": True}),
    Case("DoRA", "llama", "LoraConfig", {**_LLAMA, "use_dora": True}),
    Case("gpt2", "gpt2", "LoraConfig", {"r": 4, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc"]}),
    Case("bert, biases", "bert", "LoraConfig", {"r": 4, "lora_bias": True, "target_modules": ["query", "value"]}),
    Case("t5", "t5", "LoraConfig", {"r": 3, "target_modules": ["q", "wo"]}),
    Case("conv", "conv", "LoraConfig", _CONV),
    Case("conv, DoRA", "conv", "LoraConfig", {**_CONV, "use_dora": True}),
    Case("BD-LoRA", "llama", "LoraConfig", {**_LLAMA, **_blocks(["down"], ["q_proj"])}),
    Case("bert, BD-LoRA", "bert", "LoraConfig", {**_BERT, **_blocks([], ["query"], match_strict=False)}),
    Case("KaSA", "llama", "LoraConfig", {**_LLAMA, **_KASA}, starts_still=False),
    Case("t5, KaSA", "t5", "LoraConfig", {"r": 3, "target_modules": ["q", "wo"], **_KASA}, starts_still=False),
    Case("MonteCLoRA", "llama", "LoraConfig", {**_LLAMA, **_MONTE, "use_rslora": True}, learns_in_training=True),
    Case("VeLoRA", "llama", "LoraConfig", {**_LLAMA, "velora_config": {"num_groups": 8}}),
    Case("bert, VeLoRA", "bert", "LoraConfig", {**_BERT, "velora_config": {"num_groups": 5, "init_type": "random"}}),
]
