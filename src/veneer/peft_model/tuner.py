"""Holds the base of a PeftModel under the names that peft gives its parameters."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from veneer.adapters.call import call
from veneer.adapters.collection import Adapters
from veneer.adapters.training_step import allocate
from veneer.errors import BaseModelError

# Attributes and methods of peft's tuners that the PeftModel has here.
_OF_TUNERS = (
    *("active_adapter", "active_adapters", "peft_config", "peft_type", "prefix"),
    *("targeted_module_names", "targeted_parameter_names"),
    *("set_adapter", "enable_adapter_layers", "disable_adapter_layers", "set_requires_grad"),
    *("add_adapter", "add_weighted_adapter", "delete_adapter", "get_layer_status", "get_model_status"),
    *("merge_adapter", "unmerge_adapter", "merge_and_unload", "unload"),
)


class Tuner(nn.Module):
    """Holds the base model under the name ``model``, so that parameters are named as in peft.

    ``peft_model.base_model.model`` is the base model. The attributes of peft's tuners about adapters are those
    of the ``PeftModel``; all others are the base's.
    """

    def __init__(self, model: nn.Module, adapters: Adapters) -> None:
        super().__init__()
        self.model = model
        self.adapters = adapters
        self.training = model.training

    def belong_to(self, peft_model: nn.Module) -> None:
        """Let ``peft_model`` answer about adapters; a weak reference, so that a dropped model is freed at once."""
        vars(self)["_outer"] = weakref.ref(peft_model)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_TUNERS:
            outer = vars(self)["_outer"]()
            if outer is None:
                raise BaseModelError(
                    f"The PeftModel that {name} is asked of is gone.", hint="Keep it as long as its base_model is used."
                )
            return getattr(outer, name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_outer"}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base model under the active adapters."""
        with call(self.adapters):
            return self.model(*args, **kwargs)

    def update_and_allocate(self, global_step: int) -> None:
        """See :meth:`PeftModel.update_and_allocate`."""
        allocate(self.adapters, global_step)
