"""Sites of whole decoder blocks, for methods that change a block's input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.base_model.sites.site import Site, unsupported


class BlockSite(Site):
    """One decoder block. It has no weight of its own to change.

    Args:
        name: the block's name in the base model.
        module: the block.
        decoder: the decoder that holds the block.
        head: the classifier that reads the decoder's states, if the model has one.
    """

    products = False

    def __init__(self, name: str, module: nn.Module, decoder: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__(name, module, next(leaf for leaf, _ in module.named_parameters()))
        self.decoder, self.head = decoder, head

    @property
    def id(self) -> str:
        return self.name

    @property
    def device(self) -> torch.device:
        device = super().device
        # A model that adapters are only planned against is on the meta device.
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def shape(self) -> tuple[int, int]:
        config: Any = self.decoder.config
        width = getattr(config, "hidden_size", None) or config.num_attention_heads * config.attention_head_dim
        return int(width), int(width)

    def canonical(self, stored: Tensor) -> Tensor:
        raise unsupported(self, "a change of the weight")

    def as_stored(self, matrix: Tensor) -> Tensor:
        raise unsupported(self, "a change of the weight")
