"""Records the tokens that a base model reads, for adapters that act from an invocation on (aLoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.adapters.pass_hook import PassHook
from veneer.methods import method_of
from veneer.methods.base.abilities import ActsFromTokens
from veneer.packages import stands_in_for_peft
from veneer.patches.forward_call import current, forget_after, note
from veneer.patches.forward_tokens import ForwardTokens
from veneer.printing import warn

if TYPE_CHECKING:
    from veneer.adapters.adapter import Adapter


class InvocationHook(PassHook):
    """Notes the tokens that each pass reads; while generating, the prompt decides."""

    by_place = True

    def is_for(self, adapter: Adapter) -> bool:
        method = method_of(adapter.config)
        return isinstance(method, ActsFromTokens) and bool(method.invocation(adapter.config))

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        return [model.register_forward_pre_hook(_before, with_kwargs=True), forget_after(model, "tokens")]


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    ids, cache, prompt = (
        kwargs.get("input_ids", args[0] if args else None),
        kwargs.get("past_key_values"),
        current().prompt,
    )
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        note(tokens=_of_embeddings(kwargs.get("inputs_embeds")) if stands_in_for_peft() else None)
        return
    prompt, start = current().prompt, int(cache.get_seq_length()) if cache is not None else 0
    note(tokens=ForwardTokens(ids if prompt is None else prompt, start, ids.shape[1]))


def _of_embeddings(embeddings: Tensor | None) -> ForwardTokens | None:
    """Return tokens of which none invokes an adapter, in the place of those that embeddings hide; so it is in peft."""
    if embeddings is None:
        return None
    warn("Cannot calculate aLoRA offsets when only inputs_embeds are given: an aLoRA does nothing in this call.")
    rows, length = embeddings.shape[:2]
    return ForwardTokens(torch.zeros(rows, 0, dtype=torch.long, device=embeddings.device), 0, length)
