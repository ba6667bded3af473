"""Begins a prefix or a cartridge with what a text leaves in the base's cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.errors import AdapterError, UsageError
from veneer.keywords import takes
from veneer.peft_model.adapted_model import AdaptedModel, adapted_model


@takes()
def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """Return the first tokens of a cache as a prefix: shape ``(tokens, layers * 2 * heads * head dim)``.

    Args:
        past_key_values: a cache of transformers with one row; or keys and values of each layer, of shape
            ``(1, heads, length, head dim)``.
        num_virtual_tokens: the number of tokens to take.

    Raises:
        UsageError: the cache holds fewer tokens, or several rows.
    """
    pairs = _pairs(past_key_values)
    if not pairs:
        raise UsageError("The cache is empty.", hint="Run the model with use_cache=True first.")
    rows, _, length, _ = pairs[0].shape
    if rows != 1 or length < num_virtual_tokens:
        raise UsageError(
            f"The cache holds {rows} rows of {length} tokens, and a prefix of {num_virtual_tokens} tokens of one row "
            "is wanted.",
            hint="Give a cache of one text that is at least that long.",
        )
    return torch.cat([t[0, :, :num_virtual_tokens].transpose(0, 1).flatten(1) for t in pairs], dim=1).detach().clone()


@takes()
def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Begin a prefix or a cartridge with the first tokens of a cache, and return these: ``(tokens, width)``.

    Args:
        model: the model with adapters.
        adapter_name: a prefix without projection, or a cartridge; the active adapter when ``None``.
        past_key_values: as for :func:`prompt_embeddings_from_past_key_values`.
        num_virtual_tokens: the number of the adapter's tokens; may be left out.

    Raises:
        AdapterError: the adapter keeps no such table. UsageError: the cache or the number does not fit it.
    """
    adapted = adapted_model(model)
    name = adapter_name or adapted.active_adapter
    tables = _tables(adapted, name)
    tokens, width = sum(len(table) for table in tables), tables[0].shape[1]
    if num_virtual_tokens not in (None, tokens):
        raise UsageError(f"{name!r} has {tokens} virtual tokens, not {num_virtual_tokens}.", hint="Leave it out.")
    values = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=tokens)
    if values.shape[1] != width:
        raise UsageError(
            f"The cache has {values.shape[1]} numbers for a token, and {name!r} has {width}.",
            hint="Give a cache of the same base model, with all its layers.",
        )
    values = values.to(tables[0])
    with torch.no_grad():
        for table, rows in zip(tables, values.split([len(table) for table in tables]), strict=True):
            table.copy_(rows)
    return values


@torch.no_grad()
@takes()
def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Begin a prefix or a cartridge with what a text leaves in the base's cache, and return that: ``(tokens, width)``.

    Args:
        model: the model with adapters.
        tokenizer: the base's.
        text: at least as long as the adapter's tokens.
        adapter_name: a prefix without projection, or a cartridge; the active adapter when ``None``.
        num_virtual_tokens: the number of the adapter's tokens; may be left out.
        use_chat_template: give the text as a system's message, where the tokenizer has a template for chats.
        max_length: cut the text off after so many tokens.

    Raises:
        UsageError: the text has too few tokens.
    """
    adapted = adapted_model(model)
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template([{"role": "system", "content": text}], tokenize=False)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :max_length]
    base = adapted.get_base_model()
    with adapted.disable_adapter():
        cache = base(input_ids=ids.to(base.device), use_cache=True).past_key_values
    return initialize_kv_prefix_from_past_key_values(
        adapted, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )


def _pairs(cache: Any) -> list[Tensor]:
    """Return the keys and values of each layer, one after the other."""
    decoder = getattr(cache, "self_attention_cache", cache)
    if hasattr(decoder, "layers"):
        return [tensor for layer in decoder.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return [tensor for layer in decoder for tensor in layer[:2]]


def _tables(model: AdaptedModel, name: str) -> list[Tensor]:
    """Return the tables whose rows are an adapter's tokens, in their order."""
    adapter = model.adapters.get(name)
    prompts = model.adapters.prompts
    is_table = not getattr(adapter.config, "prefix_projection", False)
    if adapter.prompt is None or not (prompts.methods[name].fills_cache and is_table):
        raise AdapterError(
            f"{name!r} ({adapter.config.peft_type}) keeps no keys and values of its own that a cache could begin.",
            hint="Use it with prefix tuning without prefix_projection, or with a cartridge.",
        )
    return [parameter.data for parameter in prompts.encoder(name).parameters()]
