"""The config of adaption prompts (LLaMA-Adapter)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one
from veneer.errors import ConfigError

# Options of other methods that adapt layers, which a file of this one does not have.
_FOREIGN = ("exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save")


@dataclass
class AdaptionPromptConfig(TargetedConfig, peft_type=PeftType.ADAPTION_PROMPT):
    """LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199): upper attention layers read trained vectors beside the text.

    ``target_modules`` is the name of the attention modules; ``None`` takes the model type's own.

    Args, beside those of :class:`TargetedConfig`:
        adapter_len: how many vectors each of those layers has.
        adapter_layers: how many layers have them, counted from the top.
    """

    tensor_head = "adaption"
    unordered = ()

    adapter_len: int | None = None
    adapter_layers: int | None = None

    def __post_init__(self) -> None:
        # A string is a name here, and never an expression.
        if isinstance(self.target_modules, str):
            self.target_modules = [self.target_modules]
        super().__post_init__()
        check_at_least_one(self, "adapter_len", "adapter_layers")
        if self.target_modules is not None and len(self.target_modules) != 1:
            raise ConfigError(
                f"target_modules={self.target_modules!r} is not one name.",
                hint='Name the attention modules alone, such as "self_attn", or leave it out.',
            )

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if self.target_modules:
            values["target_modules"] = next(iter(self.target_modules))
        return {key: value for key, value in values.items() if value is not None or key not in _FOREIGN}
