"""Loads a path, with its tokenizer, to generate text by it."""

from __future__ import annotations

from typing import Any

from veneer.benching.measure.machine import device_of
from veneer.cli.generation_options import GenerationOptions
from veneer.cli.text_generator import TextGenerator
from veneer.peft_model.load import load
from veneer.peft_model.tokenizer import load_tokenizer


def load_generator(path: str, options: GenerationOptions, device: str | None, **loading: Any) -> TextGenerator:
    """Load whatever is at ``path`` onto a device.

    Args:
        path: an adapter, a set of adapters or a model.
        options: of the generator.
        device: the device's name; the CPU where it is ``None``.
        **loading: keywords of :func:`veneer.load`.
    """
    torch_device = None if device is None else device_of(device)
    model = load(path, **loading)
    if torch_device is not None:
        model.to(torch_device)
    return TextGenerator(model, load_tokenizer(model), options)


def seed_sampling(seed: int | None) -> None:
    """Seed the sampling of tokens, where a seed is given."""
    import torch

    if seed is not None:
        torch.manual_seed(seed)
