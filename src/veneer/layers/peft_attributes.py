"""The attributes and methods of peft's layers, for scripts that use them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PeftLayerAttributes:
    """Gives an adapted layer the attributes and methods of peft's layers."""

    @torch.no_grad()
    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        """Return the change that an adapter makes of this layer's weight, as the weight is stored and in its dtype.

        Raises:
            UnknownAdapterError: the adapter is not on this layer. MergeError: no weight can hold its change.
        """
        from veneer.errors import UnknownAdapterError
        from veneer.layers.weight_change import change_of

        if adapter not in self.bound:
            raise UnknownAdapterError(
                f"There is no adapter {adapter!r} on {self.site.name}.", hint=f"Present: {', '.join(self.bound)}."
            )
        change = change_of(self, self.weight_patches([adapter])).whole()
        delta: Tensor = self.site.as_stored(change).to(self.base_stored.dtype)
        return delta

    @property
    def scaling(self: Any) -> dict[str, float]:
        """The factor by which each adapter's LoRA is multiplied here."""
        return {name: float(value.scale) for name, value in _lora(self, "scaling")}

    @property
    def r(self: Any) -> dict[str, int]:
        """The rank of each adapter's LoRA here."""
        return {name: value.r for name, value in _lora(self, "r")}

    @property
    def active_adapters(self: Any) -> list[str]:
        """The active adapters, whether they are on this layer or not."""
        return list(self.active_selection.current.names)

    @property
    def merged_adapters(self: Any) -> list[str]:
        """The adapters that are in the base layer's weight."""
        return list(self.merged)


def _lora(layer: Any, asked: str) -> list[tuple[str, Any]]:
    """Return each adapter that has a LoRA at a layer, and its settings there."""
    from veneer.methods.lora import LoraSettings

    shares = [(name, share.settings) for name, shares in layer.bound.items() for share in shares]
    loras = [(name, settings) for name, settings in shares if isinstance(settings, LoraSettings)]
    if not loras:  # the base layer may have something of that name
        raise AttributeError(f"no LoRA is on {layer.site.name}, so it has no {asked}")
    return loras
