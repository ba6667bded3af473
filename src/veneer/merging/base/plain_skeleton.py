"""A base's skeleton from its headers and its config alone, for the families that have exactly one form.

    model.embed_tokens   model.layers.N.input_layernorm             model.norm   lm_head (or the embedding's weight)
                                       .self_attn.{q,k,v,o}_proj
                                       .post_attention_layernorm
                                       .mlp.{gate,up,down}_proj

Importing transformers' model classes takes longer than merging a model of a billion weights. What is not exactly this
(another family, method or task, a tensor too many, a shape that the config does not say) is left to transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.torch_dtypes import DTYPES
from veneer.configs.base import PeftConfig
from veneer.configs.methods.lora import LoraConfig
from veneer.configs.names import TaskType
from veneer.files.names import MODEL_CONFIG
from veneer.files.source import Source
from veneer.merging.base.skeleton import StoredNames
from veneer.merging.base.weight_files import WeightFiles


@dataclass(frozen=True)
class Family:
    """How a family differs from the others.

    Attributes:
        kind: the model's class.
        biased: the projections that have a bias.
        normed: whether each head's query and key go through a norm.
    """

    kind: str
    biased: tuple[str, ...] = ()
    normed: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", biased=("q_proj", "k_proj", "v_proj")),
    "qwen3": Family("Qwen3ForCausalLM", normed=True),
}
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")


class _Config(SimpleNamespace):
    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class _Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing to fill; on the meta device that would import torch's compiler."""


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing to fill."""


class _Norm(nn.Module):
    """A norm, of which only the weight matters here; ``weight`` has shape ``(size,)``."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)


class _Plain(nn.Module):
    config: _Config

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule("model.embed_tokens")

    def get_output_embeddings(self) -> nn.Module:
        return self.get_submodule("lm_head")


def plain_skeleton(
    source: Source, files: WeightFiles, checkpoints: Sequence[Checkpoint], task: str | None, **changes: Any
) -> nn.Module | None:
    """The model of a base, on the meta device; ``None`` where it is not plain.

    Args:
        source: the base.
        files: its weight files.
        checkpoints: the adapters.
        task: what the model is for.
        **changes: keys of the config to set.
    """
    config = {**source.json(MODEL_CONFIG), **changes}
    family = FAMILIES.get(str(config.get("model_type")))
    tasks = {task, *(checkpoint.config.task_type for checkpoint in checkpoints)}
    if (
        family is None
        or config.get("architectures") != [family.kind]
        or not tasks <= {None, TaskType.CAUSAL_LM}
        or not all(_is_lora(checkpoint.config) for checkpoint in checkpoints)
        or any(config.get(key) is not None for key in ("quantization_config", "auto_map"))
        or not all(isinstance(config.get(size), int) for size in (*_SIZES, "vocab_size"))
        or not isinstance(config.get("head_dim") or 0, int)
    ):
        return None
    tied = bool(config.get("tie_word_embeddings", False))
    shapes = dict(_shapes(family, config))
    if tied and "lm_head.weight" not in files:
        head = shapes.pop("lm_head.weight")
        shapes = shapes if head == shapes["model.embed_tokens.weight"] else {}
    elif tied:
        return None
    if shapes != {name: place.info.shape for name, place in files.places.items()}:
        return None
    if any(place.info.dtype not in DTYPES for place in files.places.values()):
        return None
    return _built(family, config, {name: files.dtype(name) for name in files.places}, shapes)


def _is_lora(config: PeftConfig) -> bool:
    """Whether an adapter adds nothing but factors; one that adds biases may need more of the config than is here."""
    return isinstance(config, LoraConfig) and not config.lora_bias


def plainly_stored(files: WeightFiles) -> StoredNames:
    """Where a plain model's parameters lie: each under its own name."""
    return StoredNames({name: name for name in files.places}, {})


def _shapes(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter and its shape."""
    hidden, inner, heads, keys, count = (config[size] for size in _SIZES)
    head = config.get("head_dim") or hidden // max(heads, 1)
    wide, narrow = heads * head, keys * head
    attention = {"q_proj": (wide, hidden), "k_proj": (narrow, hidden), "v_proj": (narrow, hidden)}
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for index in range(count):
        at = f"model.layers.{index}"
        for name, shape in {**attention, "o_proj": (hidden, wide)}.items():
            yield f"{at}.self_attn.{name}.weight", shape
            if name in family.biased:
                yield f"{at}.self_attn.{name}.bias", shape[:1]
        for name in ("q_norm", "k_norm") if family.normed else ():
            yield f"{at}.self_attn.{name}.weight", (head,)
        for name, shape in {
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }.items():
            yield f"{at}.mlp.{name}.weight", shape
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _built(
    family: Family,
    config: Mapping[str, Any],
    dtypes: Mapping[str, torch.dtype],
    shapes: Mapping[str, tuple[int, ...]],
) -> nn.Module:
    model: _Plain = type(family.kind, (_Plain,), {})()
    model.config = _Config(**config)
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight":
            _put(model, module, _module(module, shape, dtypes[name], f"{module}.bias" in shapes))
    if "lm_head.weight" not in shapes:
        embedding = "model.embed_tokens.weight"
        head = _module("lm_head", shapes[embedding], dtypes[embedding], False)
        head.weight = model.get_parameter(embedding)
        _put(model, "lm_head", head)
    return model.eval()


def _module(name: str, shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> nn.Module:
    if len(shape) == 1:
        return _Norm(shape[0], dtype)
    if name.endswith("embed_tokens"):
        return _Embedding(shape[0], shape[1], dtype=dtype, device="meta").requires_grad_(False)
    return _Linear(shape[1], shape[0], bias=bias, dtype=dtype, device="meta").requires_grad_(False)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at its dotted name, with what is above it."""
    parent = model
    for part in name.split(".")[:-1]:
        if part not in parent._modules:
            parent.add_module(part, nn.ModuleList() if part == "layers" else nn.Module())
        parent = parent._modules[part]  # type: ignore[assignment]
    parent.add_module(name.rpartition(".")[2], module)
