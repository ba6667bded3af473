"""Holds the base of a PeftModel under the names that peft gives its parameters."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

from torch import nn

from veneer.adapters.call import call
from veneer.adapters.collection import Adapters
from veneer.adapters.merge.in_memory import check_mergeable
from veneer.adapters.training_step import allocate
from veneer.errors import BaseModelError, VeneerError

# Attributes and methods of peft's tuners that the PeftModel has here.
_OF_TUNERS = (
    *("active_adapters", "peft_config", "peft_type", "prefix"),
    *("targeted_module_names", "targeted_parameter_names"),
    *("set_adapter", "enable_adapter_layers", "disable_adapter_layers", "set_requires_grad"),
    *("add_adapter", "add_weighted_adapter", "delete_adapter", "get_layer_status", "get_model_status"),
    *("unload_shadow", "last_shadow_loss"),
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

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter; all of them when several are."""
        names: list[str] = self.active_adapters
        return names[0] if len(names) == 1 else names

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """Return the settings of a base model as a dictionary."""
        config: Any = getattr(model, "config", {"model_type": "custom"})
        if hasattr(config, "to_dict"):
            config = config.to_dict()
        return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config  # type: ignore[arg-type]

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let the base's embeddings give outputs that need gradients, which reentrant checkpoints ask of inputs."""
        enable = getattr(self.model, "enable_input_require_grads", None)
        if enable is not None:
            enable()
        return model

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell whether a LoRA can hold an adapter's change: see :func:`veneer.convert_to_lora`."""
        try:
            adapter = self.adapters.get(adapter_name)
            check_mergeable(self.adapters, [adapter_name])
            for layer in adapter.layers:
                layer.site.check_low_rank()
        except VeneerError:
            return False
        return True

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """Return the numbers of parameters that an adapter's checkpoint holds, and that are trained beside it.

        Whole numbers, such as indices, count by their bytes: four are a parameter.
        """
        entry = self.adapters.get(adapter)
        saved = [t.numel() * (1 if t.is_floating_point() else t.element_size() / 4) for _, t in entry.named_tensors()]
        own = {id(parameter) for entry in self.adapters.by_name.values() for parameter in entry.parameters()}
        others = [p.numel() for p in self.parameters() if p.requires_grad and id(p) not in own]
        return int(sum(saved)), sum(others)

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
