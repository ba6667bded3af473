"""Gives adapted layers the attributes and methods of peft's layers, for libraries that visit a model layer by layer.

A layer that is asked to choose, enable or freeze adapters does so alone. What all layers have been asked for is the
model's selection again, as if it had been asked. Deleting an adapter on one layer deletes it from the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import MergeError, UnknownAdapterError
from veneer.layers import token_adapter
from veneer.layers.parameter_holder import ParameterHolder
from veneer.printing import warn


class SelectsForLayer:
    """A module of an adapted model which can have other adapters active than the model."""

    # True for a module that adapters bring whole or by its rows: it counts its own adapters alone as active.
    counts_own: bool = False

    @property
    def active_adapters(self: Any) -> list[str]:
        """The active adapters, disabled or not; of a LoRA's layer also those that are not on it."""
        names = self.chosen_adapters
        return list(self.here(tuple(names)) if self.counts_own else names)

    @property
    def chosen_adapters(self: Any) -> Sequence[str]:
        """The adapters that this layer was asked for, whether they are on it or not."""
        names: Sequence[str] = self.active_selection.asked
        return names

    @property
    def active_adapter(self: Any) -> list[str]:
        """The active adapters: peft's other name for them."""
        return list(self.active_adapters)

    @property
    def _active_adapter(self: Any) -> list[str]:
        """The active adapters: peft's private name for them, which programs set."""
        return list(self.active_adapters)

    @_active_adapter.setter
    def _active_adapter(self: Any, names: str | Sequence[str]) -> None:
        self.set_adapter(names)

    @property
    def disable_adapters(self: Any) -> bool:
        """True while the layer runs as in the base."""
        disabled: bool = self.active_selection.current.disabled
        return disabled

    def set_adapter(self: Any, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose the adapters of this layer; in ``inference_mode`` freeze them.

        Names of adapters that are not on the model are kept: a pipeline asks all of its models for the same ones.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        adapters = self.active_selection.adapters
        adapters.of_layer(self).select(names)
        if inference_mode:
            self.set_requires_grad([name for name in names if name in adapters.by_name], False)

    def enable_adapters(self: Any, enabled: bool) -> None:
        """Run the adapters of this layer from now on, or the layer as in the base."""
        self.active_selection.adapters.of_layer(self).enable(enabled)

    def set_requires_grad(self: Any, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable on this layer, or freeze them here."""
        layer = self.active_selection.adapters.of_layer(self)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            layer.require_grad(name, requires_grad)

    def trained(self, adapter: str) -> Iterator[nn.Parameter]:
        """Return the parameters of an adapter here that training may change."""
        raise NotImplementedError

    def delete_adapter(self: Any, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Delete an adapter of the model that this module belongs to; nothing happens when it is gone."""
        adapters = self.active_selection.adapters
        if adapter_name in adapters.by_name:
            adapters.delete(adapter_name)
        if new_active_adapters:
            self.set_adapter(new_active_adapters)


class BaseTunerLayer(SelectsForLayer):
    """Gives an adapted layer the attributes and methods of peft's layers."""

    @property
    def counts_own(self: Any) -> bool:  # type: ignore[override]
        """True while the only adapters here are rows of tokens beside their LoRAs on other layers."""
        heads = {name.partition(".")[0] for name in self.adapter_layer_names}
        return token_adapter.NAME in heads and len(heads) == 1

    def trained(self: Any, adapter: str) -> Iterator[nn.Parameter]:
        """Return the parameters of an adapter here that training may change."""
        for share in self.bound.get(adapter, ()):
            yield from (p for leaf, p in self.tensors(adapter, share).items() if share.method.leaf(leaf).trained)

    @property
    def merged_adapters(self: Any) -> list[str]:
        """The adapters that are in the base layer's weight."""
        return list(self.merged)

    @property
    def adapter_layer_names(self: Any) -> tuple[str, ...]:
        """The names under which this layer holds the adapters' tensors: ``lora_A``, ``lora_B`` ..."""
        return tuple(name for name, _ in self._holders())

    @property
    def other_param_names(self: Any) -> tuple[str, ...]:
        """Empty: whatever else an adapter has at this layer is part of the tensors' names or of its settings."""
        return ()

    def _all_available_adapter_names(self: Any) -> list[str]:
        """Return the names of the adapters on this layer."""
        return sorted(self.bound)

    def get_base_layer(self: Any) -> nn.Module:
        """Return the base layer, below every wrapper of it."""
        layer: nn.Module = self.site.module
        return layer

    def merge(self: Any, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Put adapters (the active ones when ``None``) into this layer's weight, beside those that are in it.

        Raises:
            MergeError: no weight can hold one of them; with ``safe_merge``, the merged weight is not finite.
        """
        wanted = self.active_adapters if adapter_names is None else list(adapter_names)
        new = tuple(name for name in self.here(tuple(wanted)) if name not in self.merged)
        if not new:
            if self.merged:
                warn("All adapters are already merged: nothing to do.")
            return
        with self.active_selection.changing(lambda: None):
            names = (*self.merged, *new)
            if safe_merge:
                _check_finite(self, names, new)
            self.merge_adapters(names)

    @torch.no_grad()
    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        """Return the change that an adapter makes of this layer's weight, as the weight is stored and in its dtype.

        Raises:
            UnknownAdapterError: the adapter is not on this layer. MergeError: no weight can hold its change.
        """
        from veneer.layers.weight_change import change_of

        if adapter not in self.bound:
            raise UnknownAdapterError(
                f"There is no adapter {adapter!r} on {self.site.name}.", hint=f"Present: {', '.join(self.bound)}."
            )
        change = change_of(self, self.weight_patches([adapter])).whole()
        delta: Tensor = self.site.as_stored(change).to(self.base_stored.dtype)
        return delta

    @property
    def peft_types(self: Any) -> dict[str, str]:
        """The method of each adapter on this layer, as its config's ``peft_type``."""
        configs = self.active_selection.adapters.by_name
        return {name: str(configs[name].config.peft_type) for name in self.bound if name in configs}

    @property
    def token_indices(self: Any) -> dict[str, list[int]]:
        """The tokens whose rows each adapter trains here."""
        from veneer.methods.shared.token_rows import TokenSettings

        shares = [(name, share.settings) for name, shares in self.bound.items() for share in shares]
        indices = {name: own.index.tolist() for name, own in shares if isinstance(own, TokenSettings)}
        if not indices:  # the base layer may have something of that name
            raise AttributeError(f"no adapter trains tokens of {self.site.name}")
        return indices

    @property
    def original_module(self: Any) -> nn.Module:
        """The base layer of a layer with trained tokens: peft's other name for it."""
        if token_adapter.NAME not in self._modules:  # the base layer may have something of that name
            raise AttributeError(f"no adapter trains tokens of {self.site.name}")
        return self.get_base_layer()  # type: ignore[no-any-return]

    @property
    def is_feedforward(self: Any) -> bool:
        """True where an (IA)3 scales the layer's input, else its output."""
        from veneer.methods.ia3 import IA3Settings

        return any(share.settings.feedforward for _, share in _with_settings(self, "is_feedforward", (IA3Settings,)))

    # -- LoRA's --------------------------------------------------------------------------------------------

    @property
    def r(self: Any) -> dict[str, int]:
        """The rank of each adapter's LoRA, AdaLoRA, LoHa or LoKr here."""
        return {name: share.settings.r for name, share in _scaled(self, "r")}

    @property
    def scaling(self: Any) -> Scaling:
        """The factor by which each adapter's low-rank change is multiplied here; setting one changes it."""
        return Scaling(self, {name: _factor(share.settings.scale) for name, share in _scaled(self, "scaling")})

    @property
    def lora_A(self: Any) -> nn.Module:
        """The ``A`` of each adapter's LoRA here; the transposed ``B`` of the embedding that an output layer follows."""
        return _with_tied(self, "lora_A", "lora_embedding_B")

    @property
    def lora_B(self: Any) -> nn.Module:
        """The ``B`` of each adapter's LoRA here; the transposed ``A`` of the embedding that an output layer follows."""
        return _with_tied(self, "lora_B", "lora_embedding_A")

    @property
    def lora_alpha(self: Any) -> dict[str, float]:
        """The ``lora_alpha`` of each adapter's LoRA here."""
        return {name: _alpha(self, name, share) for name, share in _loras(self, "lora_alpha")}

    @property
    def use_rslora(self: Any) -> dict[str, bool]:
        """True for each adapter whose LoRA is scaled by the root of its rank."""
        return {name: bool(_config(self, name).use_rslora) for name, _ in _loras(self, "use_rslora")}

    @property
    def use_dora(self: Any) -> dict[str, bool]:
        """True for each adapter whose LoRA is a DoRA."""
        return {name: share.settings.dora for name, share in _loras(self, "use_dora")}

    @property
    def lora_dropout(self: Any) -> nn.ModuleDict:
        """The dropout of each adapter's LoRA here, as modules that show it."""
        chances = {name: share.settings.dropout for name, share in _loras(self, "lora_dropout")}
        return nn.ModuleDict({name: nn.Dropout(p) if p > 0 else nn.Identity() for name, p in chances.items()})

    def set_scale(self: Any, adapter: str, scale: float) -> None:
        """Multiply an adapter's change by ``scale`` times what its config says, where the adapter is here."""
        for name, share in _scaled(self, "set_scale"):
            if name == adapter:
                _rescale(self, name, share, scale * _first_scale(self, name, share))

    def scale_layer(self: Any, scale: float) -> None:
        """Multiply the active adapters' changes here by ``scale``."""
        self._scale_active(lambda current, first: current * scale if scale != 1 else current)

    def unscale_layer(self: Any, scale: float | None = None) -> None:
        """Undo :meth:`scale_layer`; without a scale, multiply as the configs say."""
        self._scale_active(lambda current, first: first if scale is None else current / scale)

    def _scale_active(self: Any, change: Any) -> None:
        active = self.active_adapters
        for name, share in _scaled(self, "scale_layer"):
            if name in active:
                current = float(share.settings.scale)
                _rescale(self, name, share, change(current, _first_scale(self, name, share)))


def _check_finite(layer: Any, names: tuple[str, ...], new: tuple[str, ...]) -> None:
    """Raise ``MergeError`` where a layer's weight or bias would not be finite with the adapters ``names`` in it."""
    weight, bias = (merged is None or bool(merged.isfinite().all()) for merged in layer.merged_parameters(names))
    if weight and bias:
        return
    where = " The weight itself is finite, with NaNs detected in the merged bias." if weight else ""
    raise MergeError(
        f"NaNs detected in the merged weights of {layer.site.name}: {', '.join(new)} cannot be merged.{where}",
        hint="Keep the adapter unmerged, or train it again.",
    )


class Scaling(dict[str, float]):
    """Adapter -> the factor of its change of a layer; setting one changes the layer."""

    def __init__(self, layer: Any, factors: dict[str, float]) -> None:
        super().__init__(factors)
        self._layer = layer

    def __setitem__(self, adapter: str, scale: Any) -> None:
        for name, share in _scaled(self._layer, "scaling"):
            if name == adapter:
                _rescale(self._layer, name, share, float(scale))
                super().__setitem__(adapter, float(scale))
                return
        raise UnknownAdapterError(
            f"There is no LoRA {adapter!r} on {self._layer.site.name}.", hint=f"Present: {list(self)}."
        )


def _loras(layer: Any, asked: str) -> Iterator[tuple[str, Any]]:
    """Return each adapter that has a LoRA at a layer, with its share there."""
    from veneer.methods.lora import LoraSettings

    return _with_settings(layer, asked, (LoraSettings,))


def _with_tied(layer: Any, name: str, name_in_embedding: str) -> nn.Module:
    """Return what holds a factor of the LoRAs of a layer, those included that are an embedding's, transposed."""
    own = layer._modules.get(name)
    tied = [(adapter, share) for adapter, share in _loras(layer, name) if share.settings.of_embedding]
    if not tied and own is None:
        raise AttributeError(f"no adapter on {layer.site.name} has a {name}")
    if not tied:
        return own  # type: ignore[no-any-return]
    factors = ParameterHolder(layer.training)
    factors._modules.update({} if own is None else own._modules)
    for adapter, share in tied:
        factors[adapter] = factor = ParameterHolder(layer.training)
        factor["weight"] = layer.tensors(adapter, share)[name_in_embedding].T
    return factors


def _scaled(layer: Any, asked: str) -> Iterator[tuple[str, Any]]:
    """Return each adapter whose change of a layer is multiplied by ``alpha / r``, with its share there."""
    from veneer.methods.adalora import AdaLoraSettings
    from veneer.methods.loha import LoHaSettings
    from veneer.methods.lokr import LoKrSettings
    from veneer.methods.lora import LoraSettings

    return _with_settings(layer, asked, (LoraSettings, AdaLoraSettings, LoHaSettings, LoKrSettings))


def _with_settings(layer: Any, asked: str, kinds: tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    shares = [(name, share) for name, shares in layer.bound.items() for share in shares]
    chosen = [(name, share) for name, share in shares if isinstance(share.settings, kinds)]
    if not chosen:  # the base layer may have something of that name
        methods = ", ".join(kind.__name__.removesuffix("Settings") for kind in kinds)
        raise AttributeError(f"no adapter on {layer.site.name} is a {methods}, so it has no {asked}")
    return iter(chosen)


def _factor(scale: Any) -> Any:
    """Return a scale as a number, or as the tensor that compiled code reads."""
    return scale if isinstance(scale, Tensor) else float(scale)


def _config(layer: Any, adapter: str) -> Any:
    return layer.active_selection.adapters.by_name[adapter].config


def _first_scale(layer: Any, adapter: str, share: Any) -> float:
    """Return the scale that an adapter's config gives a layer."""
    scale: float = share.method.settings(_config(layer, adapter), layer.site).scale
    return scale


def _alpha(layer: Any, adapter: str, share: Any) -> float:
    rank = share.settings.r
    return _first_scale(layer, adapter, share) * (math.sqrt(rank) if _config(layer, adapter).use_rslora else rank)


def _rescale(layer: Any, adapter: str, share: Any, scale: float) -> None:
    if isinstance(share.settings.scale, Tensor):
        share.settings.scale.fill_(scale)
        layer.reset(adapter, share, share.settings)
    elif scale != share.settings.scale:
        layer.reset(adapter, share, replace(share.settings, scale=scale))
