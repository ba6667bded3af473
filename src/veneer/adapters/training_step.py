"""The steps of training that methods add: penalties of the loss, and the allocation of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from veneer.adapters.collection import Adapters
from veneer.errors import AdapterError
from veneer.methods import method_of
from veneer.methods.base.abilities import Allocates, Allocation, Penalised
from veneer.packages import stands_in_for_peft

if TYPE_CHECKING:
    from veneer.adapters.adapter import Adapter


def with_penalty(adapters: Adapters, output: Any) -> Any:
    """Add the penalty of each adapter that is being trained to the loss of a model's output."""
    loss: Any = getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or not adapters.model.training:
        return output
    penalties = [penalty for name in adapters.active if (penalty := _penalty(adapters, name)) is not None]
    for penalty in penalties:
        loss = loss + penalty.to(loss.device)
    if penalties:
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
    """Reallocate the ranks or groups of adapters that are being trained, as their configs say for ``step``.

    Raises:
        AdapterError: no active, trainable adapter reallocates any.
    """
    trained = [entry for name in adapters.active if (entry := adapters.by_name[name]).trainable]
    allocations = [(entry, allocation) for entry in trained if (allocation := _allocation(entry)) is not None]
    # The training loops of peft's users call it whatever the config says.
    if not allocations and stands_in_for_peft() and any(isinstance(method_of(e.config), Allocates) for e in trained):
        return
    if not allocations:
        raise AdapterError(
            "update_and_allocate needs an active, trainable AdaLoRA whose config has a total_step, or AdaMSS whose "
            "config has use_asa.",
            hint="Make it with AdaLoraConfig(total_step=...) or AdamssConfig(use_asa=True), or load it with "
            "is_trainable=True.",
        )
    for adapter, allocation in allocations:
        adapter.allocation = allocation
        allocation.step(adapter.config, _layers(adapter), step)


def _allocation(adapter: Adapter) -> Allocation | None:
    """Return the allocation of an adapter, begun before or now; ``None`` for one that has none."""
    method = method_of(adapter.config)
    return adapter.allocation or (method.allocation(adapter.config) if isinstance(method, Allocates) else None)


def _layers(adapter: Adapter) -> list[Mapping[str, Tensor]]:
    """Return the tensors of each layer of an adapter, without its biases."""
    own = type(method_of(adapter.config))
    return [
        layer.tensors(adapter.name, share) for layer, share in adapter.bound_layers() if isinstance(share.method, own)
    ]
