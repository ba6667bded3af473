"""The status of a model and of its layers: adapters, active ones, merged ones. Names are peft's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn

from veneer.adapters.collection import Adapters
from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.parameter import ParameterSite
from veneer.base_model.sites.site import Site
from veneer.configs.base import PromptConfig
from veneer.configs.names import PeftType
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.layers.adapter_shares import BoundAdapter
from veneer.layers.base_tuner_layer import SelectsForLayer
from veneer.layers.module_copies import ModuleCopies
from veneer.methods.base.replaced_weight import SavedWeight
from veneer.methods.base.trained_bias import Bias
from veneer.methods.shared.token_rows import LoraTokens

Irregular = Literal["irregular"]
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class TunerLayerStatus:
    """The status of one adapted layer.

    Attributes:
        name: the layer's name below the PeftModel's ``base_model``, or in the base model that was asked; that of
            trained tokens beside a LoRA ends in ``.token_adapter``.
        module_type: the method and the kind of layer, such as ``lora.Linear``; ``ModulesToSaveWrapper`` for a module
            that adapters bring whole, ``TrainableTokensLayer`` for trained tokens.
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
        adapter_model_type: peft's class for the method of the first adapter, such as ``LoraModel``.
        peft_types: adapter -> its method.
        trainable_params: the number of parameters that are trained.
        total_params: the number of parameters, the adapters' included.
        num_adapter_layers: the number of adapted layers.
        enabled: False while adapters are disabled; ``"irregular"`` if on some layers only.
        active_adapters: the selected adapters, in the order in which they apply; ``"irregular"`` if layers differ.
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
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


# An adapter's name -> its tensors at one place, and those of them that are trained.
_Tensors = dict[str, tuple[list[nn.Parameter], list[nn.Parameter]]]


def layer_status(adapters: Adapters, prefix: str = "model.") -> list[TunerLayerStatus]:
    """Return the status of each adapted layer, in the model's order; names begin with ``prefix``."""
    modules = adapters.model.named_modules()
    return [status for name, module in modules for status in _of_module(adapters, prefix + name, module)]


def _of_module(adapters: Adapters, name: str, module: nn.Module) -> Iterator[TunerLayerStatus]:
    if isinstance(module, ModuleCopies):
        copies = {adapter: list(copy.parameters()) for adapter, copy in module.copies.items()}
        yield _status(module, name, "ModulesToSaveWrapper", (), {a: (p, p) for a, p in copies.items()})
    if not isinstance(module, AdaptedLayer):
        return
    tokens = _tensors(module, lambda share: isinstance(share.method, LoraTokens))
    own = _tensors(module, lambda share: not isinstance(share.method, (LoraTokens, Bias, SavedWeight)))
    if tokens:
        yield _status(module, f"{name}.token_adapter", _TOKENS, module.merged, tokens)
    if own:
        method = adapters.by_name[next(iter(own))].config.peft_type
        yield _status(module, name, _module_type(str(method), module.site), module.merged, own)


_TOKENS = "TrainableTokensLayer"


def _tensors(layer: AdaptedLayer, belongs: Callable[[BoundAdapter], bool]) -> _Tensors:
    """Return the tensors that the adapters have in some of their shares of a layer."""
    tensors: _Tensors = {}
    for adapter, shares in layer.bound.items():
        for share in filter(belongs, shares):
            everything, trained = tensors.setdefault(adapter, ([], []))
            for leaf, parameter in layer.tensors(adapter, share).items():
                everything.append(parameter)
                trained += [parameter] if share.method.leaf(leaf).trained else []
    return tensors


def _module_type(method: str, site: Site) -> str:
    if method == PeftType.TRAINABLE_TOKENS:
        return _TOKENS
    if isinstance(site, ParameterSite):
        return f"{method.lower()}.ParamWrapper"
    is_linear = isinstance(site, LinearSite) and not site.is_packed
    return f"{method.lower()}.{'Linear' if is_linear else type(site.module).__name__}"


def _status(
    module: SelectsForLayer, name: str, module_type: str, merged: Sequence[str], tensors: _Tensors
) -> TunerLayerStatus:
    return TunerLayerStatus(
        name=name,
        module_type=module_type,
        enabled=not module.disable_adapters,
        active_adapters=list(module.chosen_adapters),
        merged_adapters=[adapter for adapter in merged if adapter in tensors],
        requires_grad={adapter: _trained(trained) for adapter, (_, trained) in tensors.items()},
        available_adapters=list(tensors),
        devices={adapter: _devices(parameters) for adapter, (parameters, _) in tensors.items()},
    )


def model_status(model: nn.Module, adapters: Adapters) -> TunerModelStatus:
    """Return the status of the whole model."""
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    layers, selection = layer_status(adapters), adapters.active_selection
    return TunerModelStatus(
        base_model_type=type(adapters.model).__name__,
        adapter_model_type=_tuner(adapters) or type(model).__name__,
        peft_types={name: str(entry.config.peft_type) for name, entry in adapters.by_name.items()},
        trainable_params=sum(n for n, trained in parameters if trained),
        total_params=sum(n for n, _ in parameters),
        num_adapter_layers=len(layers),
        enabled=_common([layer.enabled for layer in layers], selection.is_enabled),
        active_adapters=_common([layer.active_adapters for layer in layers], list(selection.asked)),
        merged_adapters=_merged(adapters),
        requires_grad={name: _trained(adapters.parameters(name)) for name in adapters.by_name},
        available_adapters=list(adapters.by_name),
        devices={name: _devices(adapters.parameters(name)) for name in adapters.by_name},
    )


def _tuner(adapters: Adapters) -> str | None:
    """Return the name of peft's class for the first adapter; ``None`` for a prompt, for which it has none."""
    config = next((entry.config for entry in adapters.by_name.values()), None)
    if config is None or isinstance(config, PromptConfig):
        return None
    return type(config).__name__.removesuffix("Config") + "Model"


def _common(of_layers: Sequence[_Value], of_model: _Value) -> _Value | Irregular:
    """Return what all layers have in common, or the model where it has none."""
    first = next(iter(of_layers), of_model)
    return first if all(value == first for value in of_layers) else "irregular"


def _devices(tensors: Iterable[nn.Parameter]) -> list[str]:
    return sorted({str(p.device) for p in tensors})


def _merged(adapters: Adapters) -> list[str] | Irregular:
    layers = {name: entry.layers for name, entry in adapters.by_name.items() if entry.layers.merged(name)}
    regular = all(len(entry.merged(name)) == len(entry) for name, entry in layers.items())
    return list(layers) if regular else "irregular"


def _trained(tensors: Iterable[nn.Parameter]) -> bool | Irregular:
    flags = {p.requires_grad for p in tensors}
    return flags.pop() if len(flags) == 1 else "irregular" if flags else False
