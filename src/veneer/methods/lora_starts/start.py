"""Describes the layer that a starting point is for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError


@dataclass(frozen=True)
class StartLayer:
    """Describes one layer that a new adapter begins on.

    Attributes:
        name: the layer's name, for errors.
        weight: its canonical weight in float32, shape ``(out, in)``.
        r: the rank.
        scale: multiplies ``B A``.
        how: the option as it stands in the config, such as ``"pissa_niter_4"``.
        options: the starting point's own config (``corda_config`` ...).
        module: the live layer, by which statistics of data were recorded.
        generator: draws random numbers; torch's own when ``None``.
    """

    name: str
    weight: Tensor
    r: int
    scale: float
    how: str
    options: Any
    module: nn.Module
    generator: torch.Generator | None = None

    def check_rank(self, largest: int | None = None) -> None:
        """Raise ``ConfigError`` when the weight has fewer directions than the rank asks for."""
        largest = min(self.weight.shape) if largest is None else largest
        if self.r > largest:
            raise ConfigError(
                f"init_lora_weights={self.how!r}: {self.name} of shape {tuple(self.weight.shape)} gives a start of "
                f"rank {largest} at most, not {self.r}.",
                hint="Lower r, or give this layer a lower rank with rank_pattern.",
            )

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Let torch's functions that take no generator draw from this layer's inside the ``with`` block."""
        if self.generator is None:
            yield
            return
        seed = int(torch.randint(2**31, (1,), generator=self.generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
