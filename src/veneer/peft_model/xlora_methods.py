"""Gives a PeftModel the methods of peft's X-LoRA models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from veneer.configs.methods.xlora import XLoraConfig
from veneer.errors import AdapterError

if TYPE_CHECKING:
    from veneer.adapters.collection import Adapters
    from veneer.adapters.xlora_pass import XLoraPass


class XLoraMethods:
    """Holds the methods of a ``PeftModel`` about the weights that the active X-LoRA gives to its LoRAs (scalings)."""

    adapters: Adapters
    xlora_pass: XLoraPass

    def _active_xlora(self) -> tuple[str, XLoraConfig]:
        """Return the first active X-LoRA adapter: its name and config."""
        for name in self.adapters.active:
            config = self.adapters.get(name).config
            if isinstance(config, XLoraConfig):
                return name, config
        raise AdapterError("No X-LoRA adapter is active.", hint="Choose one with set_adapter(...).")

    def get_latest_scalings(self) -> Tensor | None:
        """Return the weights of the last call, ``(rows, length, layers, experts)``; ``None`` before the first."""
        return self.xlora_pass.latest.get(self._active_xlora()[0])

    def get_scalings_log(self) -> list[Tensor]:
        """Return the weights of every call while logging was on."""
        return list(self.xlora_pass.log)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """Return the log by the length of the calls: length -> the places in the log, and the weights there."""
        buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
        for place, scalings in enumerate(self.xlora_pass.log):
            places, values = buckets.setdefault(scalings.shape[1], ([], []))
            places.append(place)
            values.append(scalings)
        return buckets

    def enable_scalings_logging(self) -> None:
        """Log the weights of every call from now on."""
        self.xlora_pass.logging = True

    def disable_scalings_logging(self) -> None:
        """Log no more weights; the log stays."""
        self.xlora_pass.logging = False

    def clear_scalings_log(self) -> None:
        """Empty the log."""
        self.xlora_pass.log.clear()

    def set_topk_lora(self, value: int | None) -> None:
        """Let a token use this many of the LoRAs, or all."""
        if value is not None and value < 1:
            raise AdapterError(f"top_k_lora={value} is too small.", hint="It is at least 1, or None for all.")
        self._active_xlora()[1].top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Multiply all weights by a factor."""
        self._active_xlora()[1].global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        """Return the factor of all weights."""
        return self._active_xlora()[1].global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Set the weight of each LoRA in the first pass; ``None`` gives all the same share of 1."""
        config = self._active_xlora()[1]
        config.scaling_pass_value = 1 / len(config.experts) if value is None else value
