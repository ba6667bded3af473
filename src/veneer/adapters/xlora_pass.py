"""The runtime of X-LoRA: a first pass over a call's tokens, whose hidden states give the weights of the second.

A hook on the base model makes that pass when an X-LoRA is selected. With a cache, the pass keeps keys and values of its
own behind the model's layers in it, so what reorders or crops the one does so to the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.adapters.pass_hook import PassHook, own_cache
from veneer.base_model.model_call import call_size, named_call, new_cache, taken_names, wants_cache
from veneer.configs.methods.xlora import XLoraConfig
from veneer.errors import UnsupportedError
from veneer.methods.xlora import predict
from veneer.patches.forward_call import forget_after, note
from veneer.patches.selection import NOTHING, Selection

if TYPE_CHECKING:
    from veneer.adapters.adapter import Adapter


class XLoraPass(PassHook):
    """Makes the first passes of the X-LoRA adapters on one model, and keeps the weights that came of them.

    Attributes:
        latest: adapter's name -> its weights in the last call, ``(rows, length, layers, experts)``.
        log: the weights of every call while ``logging`` is on.
    """

    by_place = True

    def __init__(self) -> None:
        super().__init__()
        self.latest: dict[str, Tensor] = {}
        self.log: list[Tensor] = []
        self.logging = False

    def is_for(self, adapter: Adapter) -> bool:
        return isinstance(adapter.config, XLoraConfig)

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        return [model.register_forward_pre_hook(self._before, with_kwargs=True), forget_after(model, "xlora_weights")]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        adapters = [adapter for _, adapter in sorted(self.selected().items()) if self.is_for(adapter)]
        if not adapters:
            return None
        call = named_call(module, args, kwargs)
        if wants_cache(module, call):
            call["past_key_values"] = new_cache(module)
        weights = {}
        for adapter in adapters:
            config = adapter.config
            assert isinstance(config, XLoraConfig)
            hidden = self._first_pass(module, call, adapter, config)
            weights[id(config)] = made = predict(config, adapter.layers.shared, hidden, module.training)
            self.latest[adapter.name] = made.detach()
            if self.logging:
                self.log.append(made.detach())
        note(xlora_weights=weights)
        return (), call

    @torch.no_grad()
    def _first_pass(self, module: nn.Module, call: Mapping[str, Any], adapter: Adapter, config: XLoraConfig) -> Tensor:
        """Return the last hidden states of the base, in which experts have a constant weight, most often zero."""
        arguments = {key: value for key, value in call.items() if key != "labels"}
        arguments |= {"output_hidden_states": True, "return_dict": True}
        cache = call.get("past_key_values")
        if cache is not None:
            arguments["past_key_values"] = own_cache(cache, adapter, module, module)
        if "use_cache" in taken_names(module):
            arguments["use_cache"] = cache is not None
        rows, length, device = call_size(call)
        shape = rows, length, len(config.target_modules or ()), len(config.experts)
        constant = torch.full(shape, config.scaling_pass_value, device=device)
        chosen = Selection((adapter.name,)) if config.scaling_pass_value else NOTHING
        with self.adapters.using(chosen):
            note(xlora_weights={id(config): constant})
            states = getattr(module.forward(**arguments), "hidden_states", None)
        if not states:
            raise UnsupportedError(
                f"{type(module).__name__} gives no hidden states, which X-LoRA reads.",
                hint="Use it on a decoder or an encoder of transformers.",
            )
        last: Tensor = states[-1]
        return last
