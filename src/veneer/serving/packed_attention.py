"""Computes the attention of a packed batch sequence by sequence, and not over the keys of all for each token.

The latter is what transformers does with SDPA: it masks the keys of other sequences, and a step of N sequences costs N
times too much. Here the sequences that generate, of one new token each, are computed together, their keys padded to
those of similar length; each prompt is computed by itself. This is registered in transformers' public tables; a call
without a packed batch is SDPA's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from veneer.errors import UnsupportedError

# Six times the tokens a second for 64 requests: benchmarks/notes.md, The attention of a server's batch.
NAME = "veneer_packed"
# What some models add to the scores, which is not computed here.
_UNKNOWN = ("softcap", "position_bias", "s_aux")


@dataclass(frozen=True)
class Generating:
    """Sequences of one new token each, whose keys are padded to the longest.

    Attributes:
        tokens: the places of their tokens in the batch, shape ``(sequences,)``.
        keys: the places of their keys among those that are read.
        mask: True for a key that is a sequence's own, shape ``(sequences, 1, 1, longest)``.
    """

    tokens: Tensor
    keys: slice
    mask: Tensor


@dataclass(frozen=True)
class PromptSequence:
    """A sequence of several new tokens.

    Attributes:
        tokens: their places in the batch.
        keys: the places of its keys among those that are read.
        mask: True for a key that a token sees, shape ``(tokens, keys)``; ``None`` where there are no earlier keys.
    """

    tokens: slice
    keys: slice
    mask: Tensor | None


@dataclass(frozen=True)
class PackedBatch:
    """The sequences of a packed batch, and in which order their keys are read from the cache.

    Attributes:
        generating: the sequences that generate, in groups of similar length.
        prompts: the others.
        read_index: the keys' places in the cache; empty where only new keys are needed.
    """

    generating: Sequence[Generating]
    prompts: Sequence[PromptSequence]
    read_index: Tensor

    @classmethod
    def of(cls, tokens: Sequence[int], keys: Sequence[int], read_index: Tensor) -> PackedBatch:
        """Lay out a batch.

        Args:
            tokens: how many new tokens each sequence has.
            keys: how many keys it has with them.
            read_index: the places of all keys in the cache, one sequence after the other.
        """
        ends, key_ends = _ends(tokens), _ends(keys)
        groups: dict[int, list[int]] = defaultdict(list)
        for number, (new, length) in enumerate(zip(tokens, keys, strict=True)):
            if new == 1 and read_index.numel():
                groups[length.bit_length()].append(number)
        order, start, generating = [], 0, []
        for numbers in groups.values():
            lengths = torch.tensor([keys[number] for number in numbers], device=read_index.device)
            firsts = torch.tensor([key_ends[number] - keys[number] for number in numbers], device=read_index.device)
            places = torch.arange(int(max(keys[number] for number in numbers)), device=read_index.device)
            order.append(read_index[firsts[:, None] + torch.minimum(places, lengths[:, None] - 1)].flatten())
            token = torch.tensor([ends[number] - 1 for number in numbers], device=read_index.device)
            own = (places < lengths[:, None])[:, None, None]
            generating.append(Generating(token, slice(start, start + own.numel()), own))
            start += own.numel()
        prompts = []
        taken = {number for numbers in groups.values() for number in numbers}
        for number, (new, length) in enumerate(zip(tokens, keys, strict=True)):
            if number in taken:
                continue
            order.append(read_index[key_ends[number] - length : key_ends[number]])
            mask = None if new == length else _causal(new, length, read_index.device)
            prompts.append(PromptSequence(slice(ends[number] - new, ends[number]), slice(start, start + length), mask))
            start += length
        return cls(generating, prompts, torch.cat(order) if read_index.numel() else read_index)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Return the attention's output, shape ``(tokens, heads, size)``.

        Args:
            query: shape ``(tokens, heads, size)``.
            key: in the order of :attr:`read_index`, shape ``(keys, groups of heads, size)``.
            value: as ``key``.
            scale: of the scores.
        """
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        for each in self.generating:
            output[each.tokens] = _generating(each, query, key, value, scale)
        for prompt in self.prompts:
            output[prompt.tokens] = _prompt(prompt, query, key, value, scale)
        return output


def _generating(each: Generating, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    count, heads = len(each.tokens), key.shape[1]
    # The heads of a group share keys, so they can be what the tokens of a sequence are to the kernel.
    grouped = query[each.tokens].view(count, heads, -1, query.shape[-1])
    keys, values = (part[each.keys].view(count, -1, heads, part.shape[-1]).transpose(1, 2) for part in (key, value))
    output = scaled_dot_product_attention(grouped, keys, values, attn_mask=each.mask, scale=scale)
    return output.reshape(count, -1, value.shape[-1])


def _prompt(prompt: PromptSequence, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    parts = (query[prompt.tokens], key[prompt.keys], value[prompt.keys])
    queries, keys, values = (part.transpose(0, 1)[None] for part in parts)
    output = scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=prompt.mask,
        is_causal=prompt.mask is None and queries.shape[2] > 1,
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return output[0].transpose(0, 1)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed_batch: PackedBatch | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers asks for it; ``packed_batch`` is among the arguments of a packed call.

    Raises:
        UnsupportedError: the layer adds to the scores what is not known here.
    """
    if packed_batch is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    unknown = [name for name in _UNKNOWN if options.get(name) is not None]
    if unknown:
        raise UnsupportedError(f"A layer's attention has {unknown[0]}, which a packed batch does not compute.")
    key, value = options["cache"].update(key, value, module.layer_idx, options)
    queries, keys, values = (part[0].transpose(0, 1) for part in (query, key, value))
    return packed_batch.attention(queries, keys, values, scaling)[None], None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _ends(lengths: Sequence[int]) -> list[int]:
    ends, total = [], 0
    for length in lengths:
        total += length
        ends.append(total)
    return ends


def _causal(tokens: int, keys: int, device: torch.device) -> Tensor:
    """Return which keys each of the last tokens of a sequence sees."""
    return torch.ones(tokens, keys, dtype=torch.bool, device=device).tril(keys - tokens)
