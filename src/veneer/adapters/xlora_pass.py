"""The runtime of X-LoRA: the first pass over a call's tokens, whose hidden states say how the second one is weighed.

A hook on the base model makes that pass when an X-LoRA is selected. With a cache, the pass keeps keys and values of its
own behind the model's layers in it, so what reorders or crops the one does so to the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.base_model.model_call import call_size, named_call, new_cache, taken_names, wants_cache
from veneer.configs.methods.xlora import XLoraConfig
from veneer.errors import AdapterError, UnsupportedError
from veneer.methods.xlora import CURRENT, holding
from veneer.patches.selection import NOTHING, Selection

if TYPE_CHECKING:
    from veneer.adapters.collection import Adapters


class XLoraPass:
    """The first passes of the X-LoRA adapters on one model, and what came of the last ones.

    Attributes:
        latest: adapter's name -> its weights in the last call, ``(rows, length, layers, experts)``.
        log: those of every call while ``logging`` is on.
    """

    # Known while there is something to watch for, and no longer: a cycle keeps a model that is dropped, until Python
    # collects its garbage.
    adapters: Adapters

    def __init__(self) -> None:
        self.latest: dict[str, Tensor] = {}
        self.log: list[Tensor] = []
        self.logging = False
        self._hooks: list[RemovableHandle] = []

    @property
    def acts_by_place(self) -> bool:
        """Whether there is an X-LoRA."""
        return bool(self._hooks)

    def refresh(self, adapters: Adapters) -> None:
        """Make the passes from now on if there is an X-LoRA, and no longer if there is none."""
        wanted = any(isinstance(entry.config, XLoraConfig) for entry in adapters.by_name.values())
        if wanted and not self._hooks:
            self.adapters, model = adapters, adapters.model
            self._hooks = [
                model.register_forward_pre_hook(self._before, with_kwargs=True),
                model.register_forward_hook(_after, always_call=True),
            ]
        if self._hooks and not wanted:
            del self.adapters
        while self._hooks and not wanted:
            self._hooks.pop().remove()

    def _selected(self) -> dict[str, XLoraConfig]:
        if not self._hooks:  # the last one was deleted while this call, which does not use it, came here
            return {}
        selection = self.adapters.switch.selection
        configs = {name: self.adapters.by_name[name].config for name in sorted(selection.applied)}
        return {name: config for name, config in configs.items() if isinstance(config, XLoraConfig)}

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from veneer.methods.xlora import predict

        configs = self._selected()
        if not configs:
            return None
        call = named_call(module, args, kwargs)
        if wants_cache(module, call):
            call["past_key_values"] = new_cache(module)
        made = {}
        for place, (name, config) in enumerate(configs.items()):
            hidden = self._first_pass(module, call, name, config, place)
            scalings = predict(config, self.adapters.by_name[name].layers.shared, hidden, module.training)
            made[id(config)] = scalings
            self.latest[name] = scalings.detach()
            if self.logging:
                self.log.append(scalings.detach())
        CURRENT.set(made)
        return (), call

    @torch.no_grad()
    def _first_pass(
        self, module: nn.Module, call: Mapping[str, Any], name: str, config: XLoraConfig, place: int
    ) -> Tensor:
        """The last hidden states of the base, in which the experts have a constant weight, for most none."""
        own = {key: value for key, value in call.items() if key != "labels"}
        own |= {"output_hidden_states": True, "return_dict": True}
        cache = call.get("past_key_values")
        if cache is not None:
            own["past_key_values"] = _own_cache(cache, module, place)
        if "use_cache" in taken_names(module):
            own["use_cache"] = cache is not None
        rows, length, device = call_size(call)
        shape = rows, length, len(config.target_modules or ()), len(config.experts)
        constant = torch.full(shape, config.scaling_pass_value, device=device)
        chosen = Selection((name,)) if config.scaling_pass_value else NOTHING
        with self.adapters.using(chosen), holding({id(config): constant}):
            states = getattr(module.forward(**own), "hidden_states", None)
        if not states:
            raise UnsupportedError(
                f"{type(module).__name__} gives no hidden states, which X-LoRA reads.",
                hint="Use it on a decoder or an encoder of transformers.",
            )
        found: Tensor = states[-1]
        return found


def _after(module: nn.Module, args: Any, output: Any) -> None:
    CURRENT.set(None)


def _own_cache(cache: Any, module: nn.Module, place: int) -> Any:
    """The part of a cache for the first pass of the ``place``-th X-LoRA: layers behind the model's own."""
    from transformers.cache_utils import Cache

    fresh = new_cache(module).layers
    if not cache.layers:
        cache.layers.extend(new_cache(module).layers)
    start = len(fresh) * (place + 1)
    if len(cache.layers) <= start:
        if cache.get_seq_length():
            raise AdapterError(
                "The cache was filled without the X-LoRA adapter that is active now.",
                hint="Begin with an empty cache, or give all tokens again.",
            )
        cache.layers.extend(fresh)
    return Cache(layers=cache.layers[start : start + len(fresh)])
