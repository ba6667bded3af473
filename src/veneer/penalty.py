"""What a method's training adds to the model's loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from veneer.adapters import Adapters
from veneer.methods import method_of


def with_penalty(adapters: Adapters, output: Any) -> Any:
    """A model's output, to whose loss each adapter that is being trained adds its method's penalty."""
    loss: Any = getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or not adapters.model.training:
        return output
    found = [penalty for name in adapters.active if (penalty := _penalty(adapters, name)) is not None]
    for penalty in found:
        loss = loss + penalty.to(loss.device)
    if found:
        output.loss = loss
    return output


def _penalty(adapters: Adapters, name: str) -> Tensor | None:
    adapter = adapters.entries[name]
    if not adapter.trainable or name in adapters.prompts:
        return None
    method = method_of(adapter.config)
    layers = [
        (share.settings, adapters.layers[module].tensors(name, share))
        for module in adapter.layers
        for share in adapters.layers[module].bound[name]
        if share.method is method
    ]
    return method.penalty(adapter.config, layers) if layers else None
