"""What a method is: how its tensors are named, made, and lowered to a patch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from veneer.config import PeftConfig
from veneer.patch import Patch
from veneer.site import Site

ConfigT = TypeVar("ConfigT", bound=PeftConfig)
SettingsT = TypeVar("SettingsT")


class Method(ABC, Generic[ConfigT, SettingsT]):
    """One PEFT method. Stateless: its tensors live in the layers, its options in the config.

    Attributes:
        peft_type: the name in ``adapter_config.json``.
        leaves: the tensors of one adapted layer, named as on disk.
    """

    peft_type: ClassVar[str]
    leaves: ClassVar[tuple[str, ...]]

    @abstractmethod
    def settings(self, config: ConfigT, name: str) -> SettingsT:
        """What ``config`` means for the module ``name``, its patterns resolved; worked out once a layer."""

    @abstractmethod
    def shapes(self, settings: SettingsT, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Leaf -> the shape it must have on a layer of canonical ``shape`` (out, in)."""

    @abstractmethod
    def init(
        self, config: ConfigT, settings: SettingsT, site: Site, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Leaf -> the float32 tensor that a new adapter starts from."""

    @abstractmethod
    def lower(self, settings: SettingsT, tensors: Mapping[str, Tensor]) -> Patch:
        """What the tensors mean for the layer. Pure and differentiable."""


AnyMethod = Method[Any, Any]
