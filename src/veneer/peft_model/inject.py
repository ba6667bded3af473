"""Puts adapters into a base model that stays the object that it is, with no PeftModel around it.

transformers' and diffusers' own ``load_adapter`` and ``add_adapter`` work so. The PeftModel that every other function
needs is there all the same; the base keeps it out of its modules (:func:`veneer.peft_model.adapted_model.injected_in`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters import replacing
from veneer.adapters.call import Call
from veneer.configs.base import PeftConfig, PromptConfig, TargetedConfig
from veneer.errors import TargetError, UnsupportedError
from veneer.files.tensor_keys import PREFIX
from veneer.keywords import takes
from veneer.patches.forward_call import current
from veneer.peft_model.adapted_model import AdaptedModel, injected_in, keep_injected
from veneer.peft_model.attach_adapter import create_adapter
from veneer.peft_model.peft_model import PeftModel
from veneer.printing import VeneerWarning

# The first sentences are peft's, for those who filter by them.
_INCONSISTENT = (
    "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the provided "
    "state_dict. This is not necessarily an issue and can be ignored if this was the intent. The {} contained these "
    "additional target modules: {}. Those of the state_dict are adapted."
)


class InconsistentTargets(VeneerWarning, RuntimeWarning):
    """Tells that an adapter's config and its tensors are for different layers."""


@takes()
def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put a new adapter into a base model and return that model. The new adapter becomes the active one.

    Its tensors have the dtype of their layer.

    Args:
        peft_config: the adapter's method and options. A copy is kept, as ``model.peft_config[adapter_name]``.
        model: the base model; its layers are wrapped in place.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: as for :meth:`PeftModel.add_adapter`.
        state_dict: adapt the layers that these tensors are for, whatever the config targets. The values are not used:
            :func:`veneer.set_peft_model_state_dict` sets them.

    Raises:
        UnsupportedError: the method puts tokens before the input, which only a PeftModel does.
        TargetError: the targets match nothing usable.
    """
    if isinstance(peft_config, PromptConfig):
        raise UnsupportedError(
            "`create_and_replace` does not support prompt learning and adaption prompt yet: "
            f"{peft_config.peft_type} puts tokens before the input, which no layer of the model can do.",
            hint="Use get_peft_model(model, config).",
        )
    given, model = model, getattr(model, "_orig_mod", model)
    base = model.get_base_model() if isinstance(model, AdaptedModel) else model
    owner = model if isinstance(model, AdaptedModel) else injected_in(base) or PeftModel(base)
    owner.adapters.note_new_modules()
    if state_dict and isinstance(peft_config, TargetedConfig):
        peft_config = _targeting(peft_config, state_dict, owner)
    name = replacing.spare(owner.adapters, adapter_name)
    create_adapter(owner, name, peft_config, float32=False, heads=False, values=not low_cpu_mem_usage)
    if name != adapter_name:
        owner.adapters.delete(adapter_name)
        owner.adapters.rename(name, adapter_name)
    owner.adapters.select(adapter_name)
    if peft_config.inference_mode:
        owner.adapters.set_trainable(adapter_name, False)
        owner.adapters.get(adapter_name).config.inference_mode = True
    base.peft_config = owner.peft_config
    if owner is not model:
        keep_injected(base, owner)
        _make_calls(base)
    return given


def _targeting(config: TargetedConfig, state_dict: Iterable[str], model: AdaptedModel) -> TargetedConfig:
    """Return a config that targets the modules that tensors are for, and warn where it means others by itself."""
    catalog = model.adapters.catalog
    by_parameter = {site.name for site in catalog.parameter_sites(getattr(config, "target_parameters", None) or ())}
    names = [name for name in modules_of(state_dict, catalog.modules) if name not in by_parameter]
    with suppress(TargetError):
        targets = catalog.targets(config)
        for whose, more in (
            ("PEFT config", [name for name in targets if name not in names]),
            ("state_dict", [name for name in names if name not in targets]),
        ):
            if more:
                warnings.warn(_INCONSISTENT.format(whose, more), InconsistentTargets, stacklevel=2)
    return dataclasses.replace(config, target_modules=names, exclude_modules=None, layers_to_transform=None)


def modules_of(tensors: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the modules that tensors of an adapter are for: for each key, the longest beginning that names one."""
    found: dict[str, None] = {}
    for key in tensors:
        parts = key.removeprefix(PREFIX).removeprefix("_orig_mod.").split(".")
        names = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        name = next((name for name in names if name in modules), None)
        if name is not None:
            found[name] = None
    return list(found)


def _make_calls(base: nn.Module) -> None:
    """Let each call of a base model be a call of the PeftModel of its adapters."""
    if _begin not in base._forward_pre_hooks.values():
        base.register_forward_pre_hook(_begin)
        base.register_forward_hook(_end, always_call=True)


class _InjectedCall(Call):
    """A call of a base model that no PeftModel is around; passes of the base inside it are a part of it."""

    __slots__ = ("depth",)

    depth: int


def _begin(base: nn.Module, args: Any) -> None:
    owner = injected_in(base)
    if owner is None or torch.compiler.is_compiling():
        return
    opened = _open_call(owner)
    if opened is not None:
        opened.depth += 1
    elif not owner.adapters.active_selection.calls():
        opened = _InjectedCall(owner.adapters)
        opened.depth = 1
        opened.__enter__()


def _end(base: nn.Module, args: Any, output: Any) -> None:
    owner = injected_in(base)
    opened = None if owner is None or torch.compiler.is_compiling() else _open_call(owner)
    if opened is None:
        return
    opened.depth -= 1
    if not opened.depth:
        opened.__exit__()


def _open_call(owner: AdaptedModel) -> _InjectedCall | None:
    opened = current().call
    return opened if isinstance(opened, _InjectedCall) and opened.adapters is owner.adapters else None
