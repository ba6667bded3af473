"""The config of X-LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one
from veneer.errors import ConfigError

# Options of other methods that adapt layers, which a file of this one does not have: its experts name the layers.
_FOREIGN = ("exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save")


@dataclass
class XLoraConfig(TargetedConfig, peft_type=PeftType.XLORA):
    """X-LoRA (Buehler and Buehler 2024, arXiv:2402.07148): a classifier weighs several LoRA adapters at each token.

    Args, beside those of :class:`TargetedConfig` (``target_modules=None``: the layers that the LoRAs adapt):
        hidden_size: the width of the base's hidden states; the base's own when ``None``.
        adapters: the LoRAs: their names on the model -> their folders or hub ids. Saved beside the adapter, in folders
            of these names or of their numbers, they are taken from there.
        enable_softmax: whether the weights of a token add up to 1.
        enable_softmax_topk: whether the weights of the ``top_k_lora`` LoRAs of a token add up to 1.
        softmax_temperature: of ``enable_softmax``; lower is sharper.
        layerwise_scalings: whether each layer has weights of its own.
        top_k_lora: how many LoRAs a token uses; all when ``None``.
        xlora_depth: how many layers the classifier has.
        xlora_size: the width of its hidden layers.
        xlora_dropout_p: dropout between its layers while training.
        use_trainable_adapters: whether the LoRAs are trained too.
        scaling_pass_value: their weight in the first pass, which the classifier reads.
        global_scaling_weight: multiplies all weights.
    """

    hidden_size: int | None = None
    adapters: dict[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0

    # Where each layer has weights of its own, a layer's place in the list is its number.
    unordered = ()

    def __post_init__(self) -> None:
        if isinstance(self.adapters, Mapping):
            self.adapters = {name: str(path) for name, path in self.adapters.items()}
        super().__post_init__()
        check_at_least_one(self, "xlora_depth", "xlora_size", "top_k_lora")
        if self.softmax_temperature <= 0:
            raise ConfigError(f"softmax_temperature={self.softmax_temperature} is not positive.", hint="Use 1.0.")

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(self.adapters or ())

    @property
    def expert_paths(self) -> Mapping[str, str]:
        return self.adapters or {}

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["target_modules"]
        return {key: value for key, value in values.items() if value is not None or key not in _FOREIGN}
