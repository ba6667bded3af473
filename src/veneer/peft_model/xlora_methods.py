"""What a model with an X-LoRA adapter can be asked and told, under peft's names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from veneer.configs.methods.xlora import XLoraConfig
from veneer.errors import AdapterError

if TYPE_CHECKING:
    from veneer.adapters.collection import Adapters
    from veneer.adapters.xlora_pass import XLoraPass


class XLoraMethods:
    """The part of a ``PeftModel`` that is about X-LoRA: the weights that the active one gives to its LoRAs."""

    adapters: Adapters
    xlora_pass: XLoraPass

    def _mixing(self) -> tuple[str, XLoraConfig]:
        """The first active X-LoRA adapter."""
        for name in self.adapters.active:
            config = self.adapters.get(name).config
            if isinstance(config, XLoraConfig):
                return name, config
        raise AdapterError("No X-LoRA adapter is active.", hint="Choose one with set_adapter(...).")

    def get_latest_scalings(self) -> Tensor | None:
        """The weights of the last call, ``(rows, length, layers, experts)``; ``None`` before the first."""
        return self.xlora_pass.latest.get(self._mixing()[0])

    def get_scalings_log(self) -> list[Tensor]:
        """The weights of every call while logging was on."""
        return list(self.xlora_pass.log)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The log by the length of the calls: length -> the places in the log, and the weights there."""
        found: dict[int, tuple[list[int], list[Tensor]]] = {}
        for place, scalings in enumerate(self.xlora_pass.log):
            places, values = found.setdefault(scalings.shape[1], ([], []))
            places.append(place)
            values.append(scalings)
        return found

    def enable_scalings_logging(self) -> None:
        """Keep the weights of every call from now on."""
        self.xlora_pass.logging = True

    def disable_scalings_logging(self) -> None:
        """Keep no more of them; the log stays."""
        self.xlora_pass.logging = False

    def clear_scalings_log(self) -> None:
        """Empty the log."""
        self.xlora_pass.log.clear()

    def set_topk_lora(self, value: int | None) -> None:
        """Let a token use this many of the LoRAs, or all."""
        if value is not None and value < 1:
            raise AdapterError(f"top_k_lora={value} is too small.", hint="It is at least 1, or None for all.")
        self._mixing()[1].top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Multiply all weights by this."""
        self._mixing()[1].global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        """What all weights are multiplied by."""
        return self._mixing()[1].global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """The weight of each LoRA in the first pass; ``None`` gives all the same share of 1."""
        config = self._mixing()[1]
        config.scaling_pass_value = 1 / len(config.experts) if value is None else value
