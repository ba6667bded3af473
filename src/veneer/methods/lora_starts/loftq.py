"""LoftQ: begin from the loss of quantising the weight (Li et al. 2023, arXiv:2310.08659, algorithm 1).

    t = 1 ... T:    Q_t = quantised(W - L_{t-1} R_{t-1})      L_t R_t = the first r singular triples of W - Q_t

Then ``scale * B A = L_T R_T``, and ``Q_T`` stands in the weight's place: ``Q + scale * B A`` is nearer to ``W`` than
``Q`` is. Four bits are blocks of NormalFloats (Dettmers et al. 2023, arXiv:2305.14314, appendix E), eight whole numbers
with a scale a row (Dettmers et al. 2022, arXiv:2208.07339): as bitsandbytes has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.configs.lora_start_options import LoftQConfig, options_of
from veneer.methods.lora_starts.start import StartLayer
from veneer.patches.low_rank import truncated

BLOCK = 64
_NORMAL_FLOATS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def start(layer: StartLayer) -> tuple[Tensor, Tensor]:
    """Return ``A`` and ``B``."""
    layer.check_rank()
    up, down = truncated(layer.weight - quantised(layer.weight, layer.r, layer.options), layer.r, layer.scale)
    return down, up


def quantised(weight: Tensor, r: int, options: Mapping[str, Any]) -> Tensor:
    """Return ``Q_T`` of a float32 weight, shape ``(out, in)``, by the options of a ``loftq_config``."""
    config = options_of(LoftQConfig, options)
    quantise = _eight_bits if config.loftq_bits == 8 else four_bits
    rounded = quantise(weight)
    for _ in range(config.loftq_iter - 1):
        up, down = truncated(weight - rounded, r)
        rounded = quantise(weight - up @ down)
    return rounded


def four_bits(weight: Tensor) -> Tensor:
    """Round each value to the nearest NormalFloat times the largest of its block of 64, along the rows."""
    values = torch.tensor(_NORMAL_FLOATS, device=weight.device)
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    index = torch.bucketize(blocks / _not_zero(largest), (values[1:] + values[:-1]) / 2)
    return (values[index] * largest).flatten()[: len(flat)].view_as(weight)


def _eight_bits(weight: Tensor) -> Tensor:
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / _not_zero(step)).round() * step


def _not_zero(largest: Tensor) -> Tensor:
    return largest.clamp_min(torch.finfo(largest.dtype).tiny)
