"""Probes how a layer's input follows the rows of the model's, by passes of the base alone.

They leave no trace: no cache, no gradient, no random number drawn, and the mode and the model's notes as they were.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base_model.model_call import taken_names
from veneer.patches.row_layout import Fingerprints, fingerprint

# The rows of a call with random tokens, and those of them that are changed: all three are told apart.
ROWS = 3
CHANGED_ROWS = (0, 1, 2)
# Tokens a row, of the input and of a decoder beside it. No multiples of the rows, nor of each other.
LENGTH, DECODER_LENGTH = 11, 7
# Tokens below the first are the usual marks of beginnings, ends and gaps; up to the last there are enough.
FIRST, LAST = 3, 1000

Call = dict[str, Any]


def observed(model: nn.Module, layers: Mapping[str, nn.Module], calls: Sequence[Call]) -> list[dict[str, Fingerprints]]:
    """Return the fingerprints of each layer's inputs in each call of ``model``, for layers that are reached."""
    with _PROBING, _as_it_was(model), torch.no_grad():
        hooks = [m.register_forward_pre_hook(partial(_note, name), with_kwargs=True) for name, m in layers.items()]
        try:
            return [_observed(model, call) for call in calls]
        finally:
            for hook in hooks:
                hook.remove()


def _observed(model: nn.Module, call: Call) -> dict[str, Fingerprints]:
    inputs: dict[str, Fingerprints] = {}
    token = _INPUTS.set(inputs)
    try:
        model(**call)
    finally:
        _INPUTS.reset(token)
    return inputs


def _note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    inputs = _INPUTS.get()
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if inputs is not None and x is not None and x.ndim:
        inputs.setdefault(name, []).append(fingerprint(x))


# Of the pass that this thread makes. No part of a call's state: the hooks see other threads' passes too.
_INPUTS: ContextVar[dict[str, Fingerprints] | None] = ContextVar("veneer_probe", default=None)
# Two threads that set the mode and put it back would leave it as the other had set it.
_PROBING = threading.RLock()


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Evaluate inside the block, and leave the model and the random numbers as they were."""
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    # Qwen-VL, for one, keeps the offset of its last prompt's positions for the passes that follow.
    notes = [(vars(m), k, v) for m in modules for k, v in vars(m).items() if v is None or isinstance(v, Tensor)]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True
            for attributes, name, value in notes:
                if name in attributes and attributes[name] is not value:
                    attributes[name] = value


# -- what to call the model with -------------------------------------------------------------------------------


def text_calls(model: nn.Module) -> list[Call]:
    """Return a call with random tokens, and one for each of ``CHANGED_ROWS`` in which that row has others."""
    generator = torch.Generator().manual_seed(0)
    config: Any = getattr(model, "config", None)
    usual = _text_call(model, config, generator)
    return [usual, *(_with_row(usual, _text_call(model, config, generator), row) for row in CHANGED_ROWS)]


def _text_call(model: nn.Module, config: Any, generator: torch.Generator) -> Call:
    device, taken = place_of(model), taken_names(model)
    call: Call = {"input_ids": _ids(config, False, LENGTH, generator).to(device)}
    if getattr(config, "is_encoder_decoder", False):
        call["decoder_input_ids"] = _ids(config, True, DECODER_LENGTH, generator).to(device)
    if "attention_mask" in taken:
        call["attention_mask"] = torch.ones_like(call["input_ids"])
    return _bare(call, taken)


def _ids(config: Any, decoder: bool, length: int, generator: torch.Generator) -> Tensor:
    pair = getattr(config, "is_encoder_decoder", False)
    text = config.get_text_config(decoder=decoder, encoder=not decoder) if pair else config.get_text_config()
    marks = special_tokens(config)
    usual = [i for i in range(FIRST, min(getattr(text, "vocab_size", None) or LAST, LAST)) if i not in marks]
    books = getattr(getattr(config, "decoder", None), "num_codebooks", 1) if decoder else 1
    ids = torch.tensor(usual)[torch.randint(len(usual), (ROWS * books, length), generator=generator)]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and not decoder:
        ids[:, -1] = end  # where BART and T5 read a sequence's class
    return ids


def _with_row(usual: Call, other: Call, row: int) -> Call:
    """Return ``usual`` with one of ``ROWS`` rows from ``other``."""
    call = dict(usual)
    for name, value in usual.items():
        if isinstance(value, Tensor):
            call[name] = value.clone()
            part = len(value) // ROWS
            call[name][row * part : (row + 1) * part] = other[name][row * part : (row + 1) * part]
    return call


def special_tokens(config: Any) -> set[int]:
    """Return the tokens to which a config, or a part of it, gives a meaning."""
    tokens: set[int] = set()
    for name, value in config.to_dict().items() if hasattr(config, "to_dict") else config.items():
        if isinstance(value, dict):
            tokens |= special_tokens(value)
        elif str(name).endswith(("_token_id", "_token_index")):
            tokens |= {i for i in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(i, int)}
    return tokens


def own_calls(model: nn.Module, call: Call, spans: Sequence[Mapping[str, slice]]) -> list[Call]:
    """Return the call itself, and one for each of ``spans`` in which these parts of its tensors are noise.

    Args:
        model: the model.
        call: its tensors by name.
        spans: argument -> the entries of one row.
    """
    taken = taken_names(model)
    usual = _bare(call, taken)
    if getattr(model, "main_input_name", "") != "input_ids" and "decoder_input_ids" in taken:
        usual = {"decoder_input_ids": _start(model, call), **usual}
    marks = special_tokens(model.config) if hasattr(model, "config") else set()
    changed = ({name: _noisy(call[name], part, marks) for name, part in span.items()} for span in spans)
    return [usual, *({**usual, **noisy} for noisy in changed)]


def _start(model: nn.Module, call: Call) -> Tensor:
    """Return random tokens for the decoder to read."""
    rows = len(call[str(model.main_input_name)])
    ids = _ids(model.config, True, DECODER_LENGTH, torch.Generator().manual_seed(0))[:1]
    return ids.expand(rows, -1).to(place_of(model))


def _noisy(value: Tensor, part: slice, marks: set[int]) -> Tensor:
    """Return ``value`` with noise in one part, or with other tokens in the place of ordinary ones."""
    value, generator = value.clone(), torch.Generator().manual_seed(0)
    if not value.is_floating_point():
        ids, last = value[part], max(int(value.max()) + 1, FIRST + 1)
        others = torch.randint(FIRST, last, ids.shape, generator=generator).to(ids)
        value[part] = torch.where(torch.isin(ids, torch.tensor(sorted(marks)).to(ids)), ids, others)
        return value
    pixels = value[part].float()
    size = pixels.std() if pixels.numel() > 1 and bool(pixels.std() > 0) else torch.ones((), device=pixels.device)
    noise = size * torch.randn(pixels.shape, generator=generator).to(pixels.device)
    # An image of zeros only fills a place, and some models leave it out.
    value[part] = (pixels + noise * (pixels != 0) if bool(pixels.any()) else noise).to(value.dtype)
    return value


def _bare(call: Call, taken: Sequence[str]) -> Call:
    """Return a call that keeps no cache."""
    return {**call, "use_cache": False} if "use_cache" in taken else call


def place_of(model: nn.Module) -> torch.device:
    """Return the device on which a model takes its input."""
    devices = (p.device for p in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))
