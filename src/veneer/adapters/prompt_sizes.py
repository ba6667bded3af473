"""Completes the config of a new prompt with the sizes of the model that it is for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from veneer.base_model.model_call import (
    encoder_of,
    is_encoder_decoder,
    module_called,
    new_cache,
    taken_names,
    unsupported_prompt,
    words_of,
)
from veneer.configs.base import PromptConfig
from veneer.errors import BindError, ConfigError
from veneer.methods.base.prompt_method import AnyPrompt


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that a prompt has to fit.

    Attributes:
        token_dim: the width of a token's embedding.
        num_layers: layers with keys and values.
        num_attention_heads: attention heads.
    """

    token_dim: int
    num_layers: int
    num_attention_heads: int


def complete(config: PromptConfig, method: AnyPrompt, model: nn.Module) -> None:
    """Fill in the sizes that ``config`` leaves to the model; a model that is none of transformers needs all of them.

    Raises:
        ConfigError: it says no length.
        UnsupportedError: the model's config does not give them, or it takes no such prompt.
        BindError: the config names other sizes than the model has.
    """
    if config.num_virtual_tokens is None:
        raise ConfigError(
            f"num_virtual_tokens is missing, the length of the {config.peft_type} prompt.",
            hint="Give it, such as num_virtual_tokens=20.",
        )
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if config.task_type == "SEQ_2_SEQ_LM" else 1
    if not _is_of_transformers(model) and all(getattr(config, field.name) is not None for field in fields(Sizes)):
        return
    sizes = asdict(_of_keys(model) if method.fills_cache else _of_words(model))
    needed = sizes if method.fills_cache else {"token_dim": sizes["token_dim"]}
    wrong = [
        f"{name} is {getattr(config, name)}, and the model's is {value}"
        for name, value in needed.items()
        if getattr(config, name) not in (None, value)
    ]
    if wrong:
        raise BindError(
            f"The prompt does not fit {type(model).__name__}: {'; '.join(wrong)}.",
            problems=wrong,
            hint=f"It names {config.base_model_name_or_path or 'no model'} as its base; load it on that one.",
        )
    for name, value in sizes.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if method.fills_cache:
        module_called(model)
    elif is_encoder_decoder(model) and "input_ids" not in taken_names(encoder_of(model)):
        raise unsupported_prompt(model, "has no tokens as its input")


def _of_words(model: nn.Module) -> Sizes:
    """Return the sizes for a prompt of embeddings."""
    config = _text_config(model)
    names = (("num_decoder_layers", "decoder_layers") if is_encoder_decoder(model) else ()) + ("num_hidden_layers",)
    layers = next((n for n in (_attribute(config, name) for name in names) if n), None)
    heads = _attribute(config, "num_attention_heads")
    if not layers or not heads or not _attribute(config, "hidden_size"):
        raise unsupported_prompt(model, "does not say how many layers and heads it has")
    words: Any = words_of(model)
    return Sizes(words.weight.shape[1], layers, heads)


def _of_keys(model: nn.Module) -> Sizes:
    """Return the sizes for a prompt of keys and values; the heads are those of the keys."""
    config, sizes = _text_config(model), _of_words(model)
    if "hidden_size" in _differing(config):
        raise unsupported_prompt(model, "has layers of different sizes", "keys and values")
    if getattr(config, "kv_lora_rank", None):
        raise unsupported_prompt(model, "has keys and values of different widths", "keys and values")
    if not all(hasattr(layer, "update") for layer in _cache_layers(new_cache(model))):
        raise unsupported_prompt(model, "has layers without keys and values", "keys and values")
    heads, width = max(_key_sizes(config, sizes.num_layers), key=lambda size: size[1])
    return Sizes(heads * width, sizes.num_layers, heads)


def own_key_sizes(module: nn.Module, layers: int) -> list[tuple[int, int]]:
    """Return the heads of the keys of each layer and their width; without the last ones where these use others' keys.

    Args:
        module: the model.
        layers: the number of its layers.
    """
    config = _text_config(module)
    return _key_sizes(config, layers)[: layers - (getattr(config, "num_kv_shared_layers", None) or 0)]


def _key_sizes(config: Any, layers: int) -> list[tuple[int, int]]:
    return [_key_size(each) for each in config.per_layer_config] if _differing(config) else [_key_size(config)] * layers


def _key_size(config: Any) -> tuple[int, int]:
    multi_query = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    heads = 1 if multi_query else getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return heads, width or config.hidden_size // config.num_attention_heads


def _text_config(model: nn.Module) -> Any:
    if not _is_of_transformers(model):
        raise unsupported_prompt(model, "is no transformers model")
    config: Any = model.config
    return config.get_text_config(decoder=True)


def _is_of_transformers(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "get_text_config")


def _differing(config: Any) -> set[str]:
    """Return the attributes of a config that are not the same for all layers."""
    return set(getattr(config, "per_layer_attributes", None) or ())


def _attribute(config: Any, name: str) -> Any:
    """Return an attribute of a config, of the first layer where layers differ."""
    return getattr(config.per_layer_config[0] if name in _differing(config) else config, name, None)


def _cache_layers(cache: Any) -> list[Any]:
    """Return the layers of a cache; for an encoder-decoder those of the decoder's own tokens."""
    return list(getattr(cache, "self_attention_cache", cache).layers)
