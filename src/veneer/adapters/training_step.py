"""What a method's training adds to the model's loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from veneer.adapters.collection import Adapters
from veneer.errors import AdapterError
from veneer.methods import method_of
from veneer.methods.base.abilities import Allocates, Allocation, Penalised

if TYPE_CHECKING:
    from veneer.adapters.adapter import Adapter


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
    adapter = adapters.by_name[name]
    if not adapter.trainable:
        return None
    method = method_of(adapter.config)
    if not isinstance(method, Penalised):
        return None
    layers = [
        (share.settings, layer.tensors(name, share))
        for layer, share in adapter.bound_layers()
        if share.method is method
    ]
    return method.penalty(adapter.config, layers) if layers else None


def allocate(adapters: Adapters, step: int) -> None:
    """Let each adapter that is being trained, and allocates what it trains, do so as its config says for ``step``.

    Raises:
        AdapterError: none of those that are active and trainable does.
    """
    trained = [entry for name in adapters.active if (entry := adapters.by_name[name]).trainable]
    found = [(entry, allocation) for entry in trained if (allocation := _allocation(entry)) is not None]
    if not found:
        raise AdapterError(
            "update_and_allocate needs an active, trainable AdaLoRA whose config has a total_step, or AdaMSS whose "
            "config has use_asa.",
            hint="Make it with AdaLoraConfig(total_step=...) or AdamssConfig(use_asa=True), or load it with "
            "is_trainable=True.",
        )
    for adapter, allocation in found:
        adapter.allocation = allocation
        allocation.step(adapter.config, _layers(adapter), step)


def _allocation(adapter: Adapter) -> Allocation | None:
    """The allocation of an adapter that has begun one, or is to begin one."""
    method = method_of(adapter.config)
    return adapter.allocation or (method.allocation(adapter.config) if isinstance(method, Allocates) else None)


def _layers(adapter: Adapter) -> list[Mapping[str, Tensor]]:
    """The tensors of each layer of an adapter, without its biases."""
    own = type(method_of(adapter.config))
    return [
        layer.tensors(adapter.name, share) for layer, share in adapter.bound_layers() if isinstance(share.method, own)
    ]
