"""Makes the models of the measurements: two bases and random adapters for them, made once and kept in a cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# TinyLlama's shape; its weights are random, since no figure depends on their values.
SHAPE_1B: Mapping[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
FEEDFORWARD = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
SOME = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
LORA: Mapping[str, Any] = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"}

# label -> the config's class, the same here and in peft, and its options. All that fit weights, as the page of methods
# calls them; those that are given a prompt, tasks or other adapters run otherwise.
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "LoRA": ("LoraConfig", LORA),
    "DoRA": ("LoraConfig", {**LORA, "use_dora": True}),
    "VeRA": ("VeraConfig", {"r": 64, "target_modules": ["q_proj", "o_proj"]}),
    "IA3": ("IA3Config", FEEDFORWARD),
    "LoHa": ("LoHaConfig", {"r": 8, "alpha": 8, **SOME}),
    "LoKr": ("LoKrConfig", {"r": 8, "alpha": 8, **SOME}),
    "OFT": ("OFTConfig", {"oft_block_size": 32, **SOME}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 12, "total_step": 100, **SOME}),
    "AdaMSS": ("AdamssConfig", SOME),
    "BEFT": ("BeftConfig", SOME),
    "BOFT": ("BOFTConfig", {"boft_block_size": 8, **SOME}),
    "C3A": ("C3AConfig", {"block_size": 64, **SOME}),
    "DEFT": ("DeftConfig", SOME),
    "DeLoRA": ("DeloraConfig", {"r": 8, **SOME}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 1000, **SOME}),
    "GLoRA": ("GloraConfig", {"r": 8, **SOME}),
    "GraLoRA": ("GraloraConfig", {"r": 32, "gralora_k": 2, **SOME}),
    "HiRA": ("HiraConfig", {"r": 8, **SOME}),
    "HRA": ("HRAConfig", {"r": 8, **SOME}),
    "Lily": ("LilyConfig", {"r": 8, "num_B": 3, **SOME}),
    "LN_Tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    "MiSS": ("MissConfig", {"r": 64, **SOME}),
    "PEANuT": ("PeanutConfig", {"r": 8, **SOME}),
    "PSOFT": ("PsoftConfig", {"r": 16, **SOME}),
    "PVeRA": ("PveraConfig", {"r": 64, "target_modules": ["q_proj", "o_proj"]}),
    "RandLoRA": ("RandLoraConfig", {"r": 16, **SOME}),
    "RoAd": ("RoadConfig", {"group_size": 64, **SOME}),
    "SHiRA": ("ShiraConfig", {"r": 8, **SOME}),
    "SuperTuning": ("SupertuningConfig", {"sparsity": 0.99, **SOME}),
    "TinyLoRA": ("TinyLoraConfig", {"r": 4, "u": 8, **SOME}),
    "UniLoRA": ("UniLoraConfig", {"r": 4, "theta_d_length": 256, **SOME}),
    "VBLoRA": ("VBLoRAConfig", {"num_vectors": 60, "vector_length": 64, **SOME}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 1000, **SOME}),
}


def cache() -> Path:
    """Return the cache folder; delete it to make everything anew."""
    from veneer.demo.base import cache_folder

    return cache_folder() / "benchmarks"


def base(model: str) -> Path:
    """Return the folder of ``"135M"``, the demo's base, or of ``"1B"``."""
    if model == "135M":
        from veneer.demo.base import demo_base

        return demo_base()
    return _made(cache() / "base-1B", _make_1b)


def adapter(model: str, method: str = "LoRA", copy: int = 0) -> Path:
    """Return the folder of an adapter of random tensors: none can be skipped as having no effect.

    Copies hold the same values in files, and so in memory, of their own.
    """
    folder = _made(cache() / f"{model}-{method}", lambda target: _make_adapter(model, method, target))
    if not copy:
        return folder
    return _made(cache() / f"{model}-{method}-{copy}", lambda target: _copy(folder, target))


def _made(folder: Path, make: Callable[[Path], None]) -> Path:
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make(folder)
        (folder / "done").touch()
    return folder


def _copy(folder: Path, target: Path) -> None:
    for file in folder.glob("adapter_*"):
        shutil.copyfile(file, target / file.name)


def _make_1b(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE_1B), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def _make_adapter(model: str, method: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import veneer

    kind, options = METHODS[method]
    plain = AutoModelForCausalLM.from_pretrained(base(model), dtype=torch.bfloat16)
    adapted = veneer.get_peft_model(plain, getattr(veneer, kind)(**options, task_type="CAUSAL_LM"), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapted.adapters.parameters("default"):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (parameter.data + 0.02 * noise).to(torch.bfloat16)
    adapted.save_pretrained(folder)
