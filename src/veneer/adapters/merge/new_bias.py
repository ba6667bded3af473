"""Adds biases to layers that have none, where an adapter moves their output: LoRA's ``lora_bias``, BEFT.

A saved model keeps such a bias only if its config says that the layer has one. Many families have a switch for that
(``attention_bias``, ``mlp_bias`` ...), for several layers at once: those that no adapter moves get zeros. Where there
is none the merge is refused, since the model would lose the bias, in silence, when it is loaded again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from veneer.base_model.sites.offload import lay_over, offloading_hook
from veneer.base_model.transformers_internals import without_memory
from veneer.errors import MergeError
from veneer.layers.adapter_shares import LayerAdapters

# Makes the model of the same config with some keys set otherwise, without weights.
Build = Callable[..., nn.Module]


@dataclass(frozen=True)
class NewBiases:
    """The biases that a merge adds.

    Attributes:
        config: keys of the model's config to set.
        shapes: layer that gets a bias -> the bias's shape, in the model's order.
    """

    config: Mapping[str, bool] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def put_into(self, model: Any) -> None:
        """Give the layers that have none a bias of zeros, and say so in the model's config."""
        for key, value in self.config.items():
            setattr(model.config, key, value)
        for name, shape in self.shapes.items():
            module = model.get_submodule(name)
            if module._parameters.get("bias") is None:
                weight, is_offloaded = module.weight, offloading_hook(module) is not None
                zeros = torch.zeros(shape, dtype=weight.dtype, device="cpu" if is_offloaded else weight.device)
                bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)
                if is_offloaded:
                    lay_over(module, "bias", bias)
                else:
                    module.register_parameter("bias", bias)


def new_biases(
    layers: Iterable[LayerAdapters], names: Sequence[str], model: nn.Module, build: Build | None = None
) -> NewBiases:
    """Find the biases that a merge of ``names`` has to add; none for a model whose class is not transformers' own.

    Args:
        layers: the adapted layers of the model.
        names: the adapters.
        model: the base.
        build: makes the base anew; by its class and config when ``None``.

    Raises:
        MergeError: a layer needs a bias, and no switch of the config gives it one.
    """
    lacking = [layer.site.name for layer in layers if layer.lacks_bias(tuple(names))]
    config: Any = getattr(model, "config", None)
    if not lacking or not hasattr(config, "to_dict"):
        return NewBiases()
    switches = _switches(config, build or _builder(model))
    used = {key: gained for key, gained in switches.items() if not gained.keys().isdisjoint(lacking)}
    shapes = {name: shape for gained in used.values() for name, shape in gained.items()}
    left = [name for name in lacking if name not in shapes]
    if left:
        raise MergeError(
            f"The adapter gives {left[0]} a bias (and {len(left) - 1} more); the layer has none, and no setting of "
            f"{type(config).__name__} adds one: the merged model would lose it when it is saved and loaded.",
            hint="Keep the adapter unmerged (merge_adapter() merges in memory, to be undone), or train it without: "
            "lora_bias=False, or these layers in exclude_modules.",
        )
    return NewBiases({key: not getattr(config, key) for key in used}, shapes)


def _switches(config: Any, build: Build) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return, for each switch of the config, the layers that gain a bias when it is flipped, and the bias's shape."""
    keys = [key for key, value in config.to_dict().items() if isinstance(value, bool) and "bias" in key]
    before = _shapes(build()) if keys else {}
    switches = {}
    for key in keys:
        try:
            after = _shapes(build(**{key: not getattr(config, key)}))
        except Exception:  # transformers raises anything for a config that no model can have
            continue
        gained = {name: shape for name, shape in after.items() if name not in before}
        if gained and before.keys() <= after.keys() and all(name.endswith(".bias") for name in gained):
            switches[key] = {name.removesuffix(".bias"): shape for name, shape in gained.items()}
    return switches


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _builder(model: nn.Module) -> Build:
    def build(**changes: Any) -> nn.Module:
        config: Any = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        for key, value in changes.items():
            setattr(config, key, value)
        with without_memory():
            made: nn.Module = type(model)(config)
        return made

    return build
