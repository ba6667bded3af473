from __future__ import annotations

from tests.methods.case import Case

_STEPS = {"total_step": 10, "init_r": 4, "lora_alpha": 20}
CASES = [
    Case("llama", "llama", "AdaLoraConfig", {**_STEPS, "target_modules": ["q_proj", "down_proj"]}),
    Case("gpt2", "gpt2", "AdaLoraConfig", {**_STEPS, "fan_in_fan_out": True, "target_modules": ["c_attn"]}),
    Case("conv", "conv", "AdaLoraConfig", {**_STEPS, "target_modules": ["conv2", "point", "first"]}),
]
