"""Makes peft's modules of virtual tokens by themselves: ``PromptEmbedding(config, words)(indices)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.configs.base import PromptConfig
from veneer.errors import ConfigError
from veneer.methods import prompt_of
from veneer.methods.base.prompt_method import PromptEncoder

_SIZES = ("num_virtual_tokens", "token_dim", "num_layers")

if TYPE_CHECKING:
    _Base = PromptEncoder
else:
    _Base = object


class LooksUpTokens(_Base):
    """Looks virtual tokens up by their places, as peft's modules do."""

    def forward(self, indices: Tensor | None, task_ids: Tensor | None = None) -> Tensor:
        """Return the virtual tokens at these places, ``(rows, n, width)``; all of them without places."""
        encoder: Any = super()
        values: Tensor = encoder.forward(task_ids)
        if indices is None:
            return values
        if values.ndim == 2:
            return values[indices]
        return torch.gather(values, 1, indices.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def made_alone(name: str, config: PromptConfig, words: nn.Module | None) -> PromptEncoder:
    """Return new virtual tokens of a config, as a module whose class is called ``name``.

    Raises:
        ConfigError: the config lacks a size.
    """
    missing = [size for size in _SIZES if getattr(config, size) is None]
    if missing:
        raise ConfigError(
            f"{name}: the config does not say {missing[0]}.", hint="Give it; no model is there to say it."
        )
    encoder = prompt_of(config).new(config, words or nn.Identity(), None)
    encoder.peft_type = str(config.peft_type)
    kind: Any = type(name, (LooksUpTokens, type(encoder)), {})
    encoder.__class__ = kind
    return encoder
