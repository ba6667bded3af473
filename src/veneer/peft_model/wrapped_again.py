"""Takes the adapters off a model that is to be given others as if it had none, which peft allows with a warning."""

from __future__ import annotations

from torch import nn

from veneer.adapters.pass_hook import PassHook
from veneer.adapters.prompts import Prompts
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.layers.module_copies import ModuleCopies
from veneer.layers.wrapping import take_off
from veneer.peft_model.adapted_model import AdaptedModel, drop_injected, injected_in
from veneer.printing import warn


def without_adapters(model: nn.Module) -> nn.Module:
    """Return the base of a model, and warn where adapters have to be taken off it.

    In peft the new adapter takes the places of those of its name, and others stay in the layers, unused.
    """
    base: nn.Module = model.get_base_model() if isinstance(model, AdaptedModel) else model
    owner = model if isinstance(model, AdaptedModel) else injected_in(base)
    if owner is None and not any(isinstance(module, (AdaptedLayer, ModuleCopies)) for module in base.modules()):
        return model
    warn(
        "You are trying to modify a model with PEFT for a second time: the adapters that it carries are taken off it. "
        "Call its unload() first if that is meant."
    )
    if owner is not None:
        owner.unload()
    take_off(base)
    _stop_hooks(base)
    drop_injected(base)
    vars(base).pop("peft_config", None)
    return base


def _stop_hooks(base: nn.Module) -> None:
    """Take the hooks of a set of adapters off a model whose PeftModel may be gone."""
    hooks = [
        hook
        for module in base.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]
    for owner in {id(owner): owner for hook in hooks if (owner := getattr(hook, "__self__", None))}.values():
        if isinstance(owner, PassHook):
            owner.stop()
        elif isinstance(owner, Prompts):
            owner.clear()
