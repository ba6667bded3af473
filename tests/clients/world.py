"""What the clients' tests work on: a tiny model with a tokenizer, adapters for it, and a start that peft has too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor, nn

VOCAB = 128
WIDTH = 64
EXPERTS = 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
SENTENCES = [" ".join(f"w{(7 * i + 3 * j) % 100}" for j in range(4 + i % 3)) for i in range(12)]


def save_base(folder: Path) -> Path:
    """Save a tiny Llama with a tokenizer of words; widths are multiples of 64, which packed weights need."""
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_moe(folder: Path) -> Path:
    """Save a tiny Mixtral with the same tokenizer."""
    torch.manual_seed(0)
    config = tf.MixtralConfig(**SIZES, num_local_experts=EXPERTS, num_experts_per_tok=2)
    tf.MixtralForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCAB - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    chat = "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat, **ends).save_pretrained(folder)


def save_adapter(folder: Path, base: Path, targets: tuple[str, ...] = ("q_proj", "v_proj"), seed: int = 1) -> Path:
    """Save a LoRA whose change is large enough to see."""
    layers = tf.AutoModelForCausalLM.from_pretrained(base).named_modules()
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers if name.endswith(targets)}
    return save_lora(folder, base, targets, shapes, seed)


def save_expert_adapter(folder: Path, base: Path) -> Path:
    """Save a LoRA of a Mixtral's attention and experts under the names that transformers 4 gave them."""
    shapes = {}
    for block in (f"model.layers.{index}" for index in range(2)):
        shapes[f"{block}.self_attn.q_proj"] = (WIDTH, WIDTH)
        for expert in (f"{block}.block_sparse_moe.experts.{index}" for index in range(EXPERTS)):
            shapes |= {f"{expert}.w1": (2 * WIDTH, WIDTH), f"{expert}.w3": (2 * WIDTH, WIDTH)}
            shapes |= {f"{expert}.w2": (WIDTH, 2 * WIDTH)}
    return save_lora(folder, base, ("q_proj", "w1", "w2", "w3"), shapes)


def save_lora(
    folder: Path, base: Path, targets: tuple[str, ...], shapes: Mapping[str, tuple[int, int]], seed: int = 1
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)},
        **{"r": 4, "lora_alpha": 8, "target_modules": [*targets]},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (out, inner) in shapes.items():
        for matrix, shape in (("A", (4, inner)), ("B", (out, 4))):
            tensors[f"base_model.model.{name}.lora_{matrix}.weight"] = torch.randn(shape, generator=generator) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def base_model(folder: Path, **options: Any) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def started(model: Any) -> Any:
    """Give the matrices A of a model's LoRAs values that do not depend on who made them."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def tokens(folder: Path) -> dict[str, Tensor]:
    """Return the tokens of one prompt."""
    encoded = tf.AutoTokenizer.from_pretrained(folder)("w3 w14 w15", return_tensors="pt", return_token_type_ids=False)
    return dict(encoded)


def answer(model: Any, folder: Path, **options: Any) -> list[int]:
    """Return the tokens that a model answers with."""
    prompt = tokens(folder)
    whole = model.generate(**prompt, max_new_tokens=5, do_sample=False, **options)
    return [int(token) for token in whole[0, prompt["input_ids"].shape[1] :]]


def last_logits(model: Any, folder: Path) -> list[float]:
    """Return some of a model's logits for the token after one prompt."""
    with torch.no_grad():
        logits = model(**tokens(folder)).logits
    return [float(value) for value in logits[0, -1, :6]]


def weight_sum(model: nn.Module, part: str = "lora_B") -> float:
    """Return a figure that stands for all trained values of a kind."""
    return sum(
        parameter.detach().double().abs().sum().item() for name, parameter in model.named_parameters() if part in name
    )


def lora(**options: Any) -> Any:
    """Return the config of a new LoRA."""
    import peft

    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    )
