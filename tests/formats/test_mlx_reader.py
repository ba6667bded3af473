"""MLX-LM itself loads what Veneer writes, and answers as Veneer does, for each kind of model whose names are known.

It runs where mlx-lm is installed: ``pip install "mlx[cpu]" mlx-lm``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from tests.formats.families import CONFIGS, family
from tests.models import gap
from tests.random_adapters import enlarge

mx: Any = pytest.importorskip("mlx.core", reason="MLX is not installed")
pytest.importorskip("mlx_lm", reason="MLX-LM is not installed")

IDS = torch.arange(3, 11)[None]


def mlx_values(model_type: str, values: dict[str, Any]) -> dict[str, Any]:
    """A config with the keys that MLX-LM reads where transformers 5 has others."""
    for config in (values, values.get("text_config") or {}):
        rope = config.get("rope_parameters") or {}
        config.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        config.setdefault("rope_scaling", rope if rope.get("rope_type") == "yarn" else None)
        if "partial_rotary_factor" in rope:
            config.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    if model_type == "gpt_neox":
        values |= {"rotary_emb_base": values["rope_theta"], "rotary_pct": values["partial_rotary_factor"]}
    if model_type == "qwen3_moe":
        values |= {"num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False}
    if model_type == "lfm2":
        values |= {"block_dim": 32, "conv_dim": 32, "conv_L_cache": 3}
    if model_type == "qwen3_vl_moe":
        values["text_config"] |= {"num_experts": 4, "norm_topk_prob": True, "mlp_only_layers": []}
    if model_type == "exaone4":
        values["sliding_window_pattern"] = "LLLG"
    if model_type == "apertus":
        values |= {"mlp_bias": False, "post_norm": False, "qk_norm": True}
    if model_type in ("gemma3", "gemma4"):
        values["text_config"]["vocab_size"] = 64
    return values


def gpt_oss_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts as MLX's own copies of the model have them; MLX-LM converts only quantised ones."""
    weights = {}
    for key, tensor in tensors.items():
        parts = {"gate_proj": tensor[..., 0::2], "up_proj": tensor[..., 1::2]} if "gate_up_proj" in key else {}
        if "gate_up_proj_bias" in key:
            weights |= {key.replace("gate_up_proj_bias", f"{name}.bias"): part for name, part in parts.items()}
        elif parts:
            weights |= {key.replace("gate_up_proj", f"{name}.weight"): part.mT for name, part in parts.items()}
        elif key.endswith("down_proj"):
            weights[f"{key}.weight"] = tensor.mT
        else:
            weights[key.replace("down_proj_bias", "down_proj.bias")] = tensor
    return {key: tensor.contiguous() for key, tensor in weights.items()}


def fused_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts in one tensor, as the published files have them and transformers does not save them."""
    names = sorted({key.partition(".experts.")[0] for key in tensors if ".experts.0." in key})
    weights = {key: tensor for key, tensor in tensors.items() if ".experts." not in key or key.endswith("_proj")}
    for name in names:
        parts = {
            part: torch.stack([tensors[f"{name}.experts.{expert}.{part}_proj.weight"] for expert in range(4)])
            for part in ("gate", "up", "down")
        }
        weights[f"{name}.experts.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1)
        weights[f"{name}.experts.down_proj"] = parts["down"]
    return weights


WEIGHTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "gpt_oss": gpt_oss_weights,
    "qwen3_5_moe": fused_weights,
    "qwen3_vl_moe": lambda tensors: {  # the published files have them as (experts, in, out)
        key: tensor.mT.contiguous() if ".experts." in key else tensor for key, tensor in tensors.items()
    },
    "gpt2": lambda tensors: {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()},
}


def loaded(folder: Path, model: nn.Module, adapter: Path | None = None) -> Any:
    """A model of MLX-LM, made of one of transformers, and an adapter loaded into it."""
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    saved: Any = model
    saved.save_pretrained(folder)
    model_type = saved.config.model_type
    config = folder / "config.json"
    config.write_text(json.dumps(mlx_values(model_type, json.loads(config.read_text()))))
    if model_type in WEIGHTS:
        tensors = WEIGHTS[model_type](load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    mlx_model, _ = load_model(folder)
    return mlx_model if adapter is None else load_adapters(mlx_model, str(adapter))


def answers(mlx_model: Any) -> Tensor:
    return torch.tensor(mlx_model(mx.array(IDS.numpy())).astype(mx.float32).tolist())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_the_answers_are_the_same(tmp_path: Path, model_type: str) -> None:
    model = family(model_type)
    linear = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and not any(w in name for w in ("vis", "multi_modal"))
    ]
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    linear = [name for name in linear if not (tied and name.endswith("head"))]
    parameters = [
        name
        for name, _ in model.named_parameters()
        if name.endswith((".gate_up_proj", ".experts.down_proj", ".router.weight"))
        or (name.endswith("mlp.gate.weight") and name.removesuffix(".weight") not in linear)
    ]
    if model_type in ("deepseek_v3", "dots1", "glm4_moe"):
        linear = [name for name in linear if not name.endswith("kv_b_proj")]
        parameters = [name for name in parameters if not name.endswith("gate.weight")]
    config = veneer.LoraConfig(
        r=3, lora_alpha=2, target_modules=linear, target_parameters=parameters or None, init_lora_weights=False
    )
    adapted = veneer.get_peft_model(model, config, seed=1).eval()
    enlarge(adapted, "default")
    adapted.save_pretrained(tmp_path / "adapter")
    veneer.convert(tmp_path / "adapter", tmp_path / "mlx", to="mlx", base=family(model_type))
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
    base = answers(loaded(tmp_path / "base", family(model_type)))
    found = answers(loaded(tmp_path / "again", family(model_type), tmp_path / "mlx"))
    assert gap(base, expected) > 0.1
    # Several kinds approximate the GELU otherwise.
    assert gap(found, expected) < 0.01


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 0, "up_proj": 9}},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": r".*\.1\..*(q|down)_proj"},
    ],
    ids=["dora", "mixed", "embeddings", "last-layer"],
)
def test_options(tmp_path: Path, options: dict[str, Any]) -> None:
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]}
    config = veneer.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **{**targets, **options})
    adapted = veneer.get_peft_model(family("llama"), config, seed=1).eval()
    enlarge(adapted, "default")
    adapted.save_pretrained(tmp_path / "adapter")
    veneer.convert(tmp_path / "adapter", tmp_path / "mlx", to="mlx", base=family("llama"))
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
    found = answers(loaded(tmp_path / "base", family("llama"), tmp_path / "mlx"))
    assert gap(found, expected) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_what_mlx_saves_is_read(tmp_path: Path) -> None:
    """An adapter that MLX-LM made and saved, with its own config, answers here as there."""
    import mlx.nn as mnn
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mlx_model = loaded(tmp_path / "base", family("qwen3_moe"))
    parameters = {"rank": 3, "scale": 0.5, "dropout": 0.0}
    mlx_model.freeze()
    linear_to_lora_layers(mlx_model, 2, parameters)
    trained = [
        (key, 0.3 * mx.random.normal(value.shape)) for key, value in tree_flatten(mlx_model.trainable_parameters())
    ]
    mlx_model.load_weights(trained, strict=False)
    folder = tmp_path / "mlx"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(trained))
    values = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "model": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    assert isinstance(mlx_model, mnn.Module)
    veneer.convert(folder, tmp_path / "peft", base=family("qwen3_moe"))
    model = veneer.PeftModel.from_pretrained(family("qwen3_moe"), tmp_path / "peft").eval()
    with torch.no_grad(), warnings.catch_warnings():
        found = model(input_ids=IDS).logits
    assert gap(found, answers(mlx_model)) < 1e-4
    veneer.convert(tmp_path / "peft", tmp_path / "back", to="mlx", base=family("qwen3_moe"))
    assert gap(answers(loaded(tmp_path / "again", family("qwen3_moe"), tmp_path / "back")), answers(mlx_model)) < 1e-4
