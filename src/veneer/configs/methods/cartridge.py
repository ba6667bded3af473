"""The config of Cartridges."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import PromptConfig
from veneer.configs.names import PeftType
from veneer.errors import ConfigError


@dataclass
class CartridgeConfig(PromptConfig, peft_type=PeftType.CARTRIDGE):
    """Cartridges (Eyuboglu et al. 2025, arXiv:2506.06266): a trained cache in the place of a long text's.

    Args, beside those of :class:`PromptConfig`:
        num_frozen_tokens: how many of its first tokens are not trained: the first is an attention sink.
    """

    num_frozen_tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.num_frozen_tokens <= (self.num_virtual_tokens or self.num_frozen_tokens):
            raise ConfigError(
                f"num_frozen_tokens={self.num_frozen_tokens} does not lie between 0 and {self.num_virtual_tokens}.",
                hint="It is a part of num_virtual_tokens.",
            )
