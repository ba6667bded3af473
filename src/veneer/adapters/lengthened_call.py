"""Lengthens the labels, the mask and the positions of a call by the virtual tokens of a prompt, which come first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.base_model.model_call import is_encoder_decoder, taken_names
from veneer.errors import AdapterError, UnsupportedError
from veneer.methods.base.prompt_method import IGNORED


def check_even(module: nn.Module, mask: Tensor) -> None:
    """Raise ``AdapterError`` where a model reads its answer off the first or last place, and has a gap there."""
    generates = getattr(module, "can_generate", None)
    if not bool(mask.all()) and not is_encoder_decoder(module) and not (generates is not None and generates()):
        raise AdapterError(
            "The rows of this batch have prompts of different lengths, or none, which this kind of model cannot mask.",
            hint="Give it rows with prompts of one length.",
        )


def lengthen_labels(call: dict[str, Any], length: int, mask: Tensor) -> None:
    """Give the virtual tokens labels that are not counted, and the first token type."""
    rows, tokens = mask.shape
    labels, types = call.get("labels"), call.get("token_type_ids")
    # Labels of tokens are whole numbers, one for each; other tasks have other shapes, or fractions.
    if labels is not None and labels.shape == (rows, length) and not labels.is_floating_point():
        call["labels"] = torch.cat([labels.new_full((rows, tokens), IGNORED), labels], dim=1)
    if types is not None:
        call["token_type_ids"] = F.pad(types, (tokens, 0))


def joined_mask(mask: Tensor, given: Tensor | None, length: int) -> Tensor | None:
    """Return the mask of the virtual tokens and ``length`` others; ``given`` is the others' mask, or that of all."""
    if given is None:
        return None if bool(mask.all()) else F.pad(mask, (0, length), value=1)
    if given.ndim != 2:
        raise UnsupportedError(
            f"A prompt is active, and the attention mask has {given.ndim} dimensions.",
            hint="Give a mask of shape (rows, tokens), and leave cache_implementation at its default.",
        )
    return torch.cat([mask.to(given), given], dim=1) if given.shape[1] == length else given


def fit_mask_and_positions(
    module: nn.Module, call: dict[str, Any], mask: Tensor, seen: int, new: int, mask_name: str
) -> None:
    """Lengthen a call's mask and positions by the virtual tokens, which come first.

    Args:
        module: the module that is called.
        call: its arguments.
        mask: of the virtual tokens.
        seen: tokens in the cache before the call, virtual ones among them.
        new: tokens in the call, without virtual ones.
        mask_name: the name of the mask's argument.
    """
    tokens = mask.shape[1]
    others = new + (seen - tokens if seen else 0)
    whole = call[mask_name] = joined_mask(mask, call.get(mask_name), others)
    if "position_ids" not in taken_names(module):
        return
    inserted = not seen and call.get("inputs_embeds") is not None and call["inputs_embeds"].shape[1] == new + tokens
    positions = call.get("position_ids")
    if positions is not None:
        positions = positions + mask.sum(1, keepdim=True)
        if inserted:
            first = (mask.cumsum(1) - 1).clamp(min=0).expand(*positions.shape[:-1], -1)
            positions = torch.cat([first, positions], dim=-1)
        call["position_ids"] = positions
    elif whole is not None and _has_gaps(whole):
        counted = (whole.long().cumsum(1) - 1).clamp(min=0)
        call["position_ids"] = counted[:, -(new + tokens if inserted else new) :]


def _has_gaps(mask: Tensor) -> bool:
    """Tell whether a masked token comes before one that is not, as padding on the left does."""
    return bool((mask[:, :-1] < mask[:, 1:]).any())
