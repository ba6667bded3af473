"""The status of a model and of its layers: adapters, active ones, merged ones. Names are peft's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from veneer.adapters.collection import Adapters
from veneer.layers.adapted_layer import AdaptedLayer

Irregular = Literal["irregular"]


@dataclass(frozen=True)
class TunerLayerStatus:
    """The status of one adapted layer.

    Attributes:
        name: the layer's name in the base model; with a colon and the parameter's where it is not the weight.
        module_type: the class of the base layer.
        enabled: False while adapters are disabled.
        active_adapters: the selected adapters, those included that do not change this layer.
        merged_adapters: those in the base layer's weight now.
        requires_grad: adapter -> True if its tensors here are trained, ``"irregular"`` if only some are.
        available_adapters: those that change this layer.
        devices: adapter -> the devices of its tensors here.
        quantization_backend: the library that quantised the base layer's weight.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass(frozen=True)
class TunerModelStatus:
    """The status of a whole model.

    Attributes:
        base_model_type: the class of the base model.
        adapter_model_type: the class of the model with adapters.
        peft_types: adapter -> its method.
        trainable_params: the number of parameters that are trained.
        total_params: the number of parameters, the adapters' included.
        num_adapter_layers: the number of adapted layers.
        enabled: False while adapters are disabled.
        active_adapters: the selected adapters, in the order in which they apply.
        merged_adapters: those merged into every layer that they change; ``"irregular"`` if one is in some only.
        requires_grad: adapter -> True if it is trained, ``"irregular"`` if only some of its tensors are.
        available_adapters: all adapters.
        devices: adapter -> the devices of its tensors.
        quantization_backend: the library that quantised the base.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def layer_status(adapters: Adapters) -> list[TunerLayerStatus]:
    """Return the status of each adapted layer, in the order in which they were first adapted."""
    return [_of_layer(adapters, layer) for layer in adapters.adapted_layers]


def _of_layer(adapters: Adapters, layer: AdaptedLayer) -> TunerLayerStatus:
    tensors = {a: [p for s in shares for p in layer.tensors(a, s).values()] for a, shares in layer.bound.items()}
    trained = {
        a: [p for s in shares for leaf, p in layer.tensors(a, s).items() if s.method.leaf(leaf).trained]
        for a, shares in layer.bound.items()
    }
    return TunerLayerStatus(
        name=layer.site.id,
        module_type=type(layer.site.module).__name__,
        enabled=adapters.active_selection.enabled,
        active_adapters=adapters.active,
        merged_adapters=list(layer.merged),
        requires_grad={name: _trained(parameters) for name, parameters in trained.items()},
        available_adapters=list(layer.bound),
        devices={name: _devices(parameters) for name, parameters in tensors.items()},
    )


def model_status(model: nn.Module, adapters: Adapters) -> TunerModelStatus:
    """Return the status of the whole model."""
    layers = layer_status(adapters)
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return TunerModelStatus(
        base_model_type=type(adapters.model).__name__,
        adapter_model_type=type(model).__name__,
        peft_types={name: str(entry.config.peft_type) for name, entry in adapters.by_name.items()},
        trainable_params=sum(n for n, trained in parameters if trained),
        total_params=sum(n for n, _ in parameters),
        num_adapter_layers=len(layers),
        enabled=adapters.active_selection.enabled,
        active_adapters=adapters.active,
        merged_adapters=_merged(adapters, layers),
        requires_grad={name: _trained(adapters.parameters(name)) for name in adapters.by_name},
        available_adapters=list(adapters.by_name),
        devices={name: _devices(adapters.parameters(name)) for name in adapters.by_name},
    )


def _devices(tensors: Iterable[nn.Parameter]) -> list[str]:
    return sorted({str(p.device) for p in tensors})


def _merged(adapters: Adapters, layers: Iterable[TunerLayerStatus]) -> list[str] | Irregular:
    merged = [name for name in adapters.by_name if any(name in layer.merged_adapters for layer in layers)]
    regular = all(
        name in layer.merged_adapters for layer in layers for name in merged if name in layer.available_adapters
    )
    return merged if regular else "irregular"


def _trained(tensors: Iterable[nn.Parameter]) -> bool | Irregular:
    flags = {p.requires_grad for p in tensors}
    return flags.pop() if len(flags) == 1 else "irregular" if flags else False
