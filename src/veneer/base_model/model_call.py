"""Reads the calls of a base model: the names it takes, the size of a call, its cache and its embedding."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from veneer.errors import AdapterError, UnsupportedError


def wants_cache(module: nn.Module, call: Mapping[str, Any]) -> bool:
    """Tell whether the model would make a cache for this call, so that a prompt has to be in it."""
    if call.get("past_key_values") is not None or "past_key_values" not in taken_names(module) or module.training:
        return False
    use_cache = call.get("use_cache")
    return bool(getattr(module.config, "use_cache", False) if use_cache is None else use_cache)


def unsupported_prompt(model: nn.Module, why: str, of: str = "") -> UnsupportedError:
    """Make the error for a model that can carry no prompt."""
    return UnsupportedError(
        f"{type(model).__name__} {why}, so it can carry no prompt{of and f' of {of}'}.",
        hint="Use a method that adapts layers, such as LoRA.",
    )


def words_of(model: nn.Module) -> nn.Module:
    """Return the model's input embedding."""
    try:
        words: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        raise unsupported_prompt(model, "has no input embedding") from None
    return words


def place_of(model: nn.Module) -> torch.device:
    """Return the device for a prompt's tensors: the input embedding's, or the CPU where that is offloaded."""
    try:
        words = words_of(model)
    except UnsupportedError:  # a prefix on a model that is none of transformers
        words = model
    device = next((p.device for p in words.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def is_encoder_decoder(model: nn.Module) -> bool:
    """Tell whether a model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def encoder_of(model: nn.Module) -> nn.Module:
    """Return the encoder of an encoder-decoder."""
    encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
    return encoder


def taken_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a module's ``forward``."""
    return _parameters(type(module).forward)


@functools.lru_cache(maxsize=64)
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def module_called(model: nn.Module) -> nn.Module:
    """Return the module that takes a cache: the model, or the backbone below its head."""
    for module in (model, getattr(model, str(getattr(model, "base_model_prefix", "")), None)):
        if isinstance(module, nn.Module) and "past_key_values" in taken_names(module):
            return module
    raise unsupported_prompt(model, "takes no past_key_values")


def named_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name."""
    return {**dict(zip(taken_names(module), args, strict=False)), **kwargs}


def call_size(call: Mapping[str, Any], prefix: str = "") -> tuple[int, int, torch.device]:
    """Return the rows and tokens of a call's input, and its device."""
    for name in (f"{prefix}input_ids", f"{prefix}inputs_embeds", *(["labels"] if prefix else [])):
        tokens = call.get(name)
        if tokens is not None:
            return tokens.shape[0], tokens.shape[1], tokens.device
    raise AdapterError(
        f"A prompt is active, and the call has neither {prefix}input_ids nor {prefix}inputs_embeds.",
        hint="Give the tokens, or select another adapter.",
    )


def cached_positions(cache: Any) -> int:
    """Return the number of tokens that a cache holds."""
    return 0 if cache is None else int(cache.get_seq_length())


def new_cache(module: nn.Module) -> Any:
    """Return an empty cache for a model."""
    from transformers import DynamicCache, EncoderDecoderCache

    config: Any = module.config
    if is_encoder_decoder(module):
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=config)
