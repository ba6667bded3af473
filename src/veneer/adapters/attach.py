"""Adds an adapter to a model, from its checkpoint or new from its config: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.attach_layers import AttachingLayers
from veneer.adapters.attach_prompt import AttachingPrompt
from veneer.adapters.attaching import Attaching
from veneer.adapters.collection import Adapters
from veneer.adapters.guard import guarded
from veneer.base_model.tied_embeddings import name_all
from veneer.checkpoints.binding_plan import Plan, bind_error, make_plan
from veneer.checkpoints.checkpoint import Checkpoint
from veneer.configs.base import AnyConfig, PeftConfig, PromptConfig, as_any_config
from veneer.configs.names import HEADS
from veneer.errors import ConfigTypeError, NonFiniteError, TargetError
from veneer.methods import method_of
from veneer.methods.base.abilities import SureToChange
from veneer.packages import stands_in_for_peft
from veneer.printing import IdleNameWarning, warn

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


@guarded
def load(
    adapters: Adapters,
    name: str,
    checkpoint: Checkpoint,
    *,
    trainable: bool,
    strict: bool = True,
    float32: bool = False,
) -> Adapter:
    """Add an adapter from its checkpoint. Either all of it is added or the model stays as it was.

    Raises:
        BindError: checkpoint and model do not fit (with ``strict=False`` what fits is used, with a warning).
        NonFiniteError: it holds NaN or infinite values.
        DuplicateAdapterError: the name is taken.
    """
    adapters.check_new(name)
    adapter = Adapter(name, as_any_config(checkpoint.config), checkpoint.origin, trainable=trainable)
    attaching = _attaching(adapters, adapter, float32)
    attaching.complete_config()
    plan = make_plan(adapter.config, method_of(adapter.config), checkpoint.tensors, adapters.catalog)
    _check_plan(adapters, plan, checkpoint, strict)
    tensors = checkpoint.read(plan.keys)
    attaching.check_tied(plan, tensors)
    sums = check_finite(tensors, checkpoint.origin)
    adapter.notes = [*checkpoint.notes, *plan.notes]
    adapter.tensors_bound = len(plan.keys)
    adapter.unused_keys = [] if strict else [key for key in checkpoint.tensors if key not in set(plan.keys)]
    attaching.restore(plan, tensors)
    adapter.note_zero_layers(_sure_to_change(plan, sums))
    attaching.restore_whole_modules(plan, tensors)
    return attaching.registered()


@guarded
def create(
    adapters: Adapters,
    name: str,
    config: PeftConfig,
    *,
    generator: torch.Generator | None = None,
    float32: bool = True,
) -> Adapter:
    """Add a new, trainable adapter, with tensors in float32; or else in the dtype of a base in half precision.

    Raises:
        TargetError: the config's targets match nothing usable.
        DuplicateAdapterError: the name is taken.
    """
    adapters.check_new(name)
    config.check_supported()
    adapter = Adapter(name, as_any_config(config), trainable=True)
    attaching = _attaching(adapters, adapter, float32)
    attaching.complete_config()
    name_all(adapter.config, adapters.catalog)
    roots = adapters.catalog.whole_modules(adapter.config)
    _check_saved_exist(adapters, adapter.config)
    attaching.create(roots, generator)
    adapter.note_zero_layers()
    for root in roots:
        attaching.place_copy(root, None, trainable=True)
    return attaching.registered()


def _attaching(adapters: Adapters, adapter: Adapter, float32: bool) -> Attaching:
    if isinstance(adapter.config, PromptConfig):
        return AttachingPrompt(adapters, adapter, float32, adapter.config)
    return AttachingLayers(adapters, adapter, float32)


def _check_plan(adapters: Adapters, plan: Plan, checkpoint: Checkpoint, strict: bool) -> None:
    if plan.problems:
        error = bind_error(
            plan, as_any_config(checkpoint.config), checkpoint.origin, len(checkpoint.tensors), adapters.catalog
        )
        if strict or not plan.keys:
            raise error
        warn(error.message + " What fits is used (strict=False).")
        plan.notes += plan.problems
    adapters.check_spread([b.site for b in plan.bindings], list(plan.whole_modules))
    adapters.check_places([b.site.name for b in plan.bindings], list(plan.whole_modules))


def _check_saved_exist(adapters: Adapters, config: AnyConfig) -> None:
    """Raise where a module to be saved whole is not there, or a container; of a task's usual heads one is enough."""
    for name in adapters.catalog.whole_modules(config):
        kind = type(adapters.catalog.modules[name])
        if issubclass(kind, _CONTAINERS):
            raise ConfigTypeError(
                f"modules_to_save cannot be applied to modules of type {kind}: {name} is never called itself.",
                hint="Name the modules in it.",
            )
    usual = HEADS.get(str(config.task_type), ())
    for name in set(config.modules_to_save or ()) - set(usual):
        if any(module.endswith(name) for module in adapters.catalog.modules):
            continue
        error = TargetError(
            f"modules_to_save names {name!r}, and the model has no such module.",
            hint=f"Its output layer is {' or '.join(adapters.catalog.output_embeddings) or 'unknown'}.",
        )
        # As with peft, which says nothing: scripts name the modules of several families at once.
        if not stands_in_for_peft():
            raise error
        warn(str(error), IdleNameWarning)


def _sure_to_change(plan: Plan, sums: Mapping[str, float]) -> set[str]:
    """Return the layers that change, as far as the sums of an adapter's tensors tell."""
    return {
        binding.site.id
        for binding in plan.bindings
        if isinstance(binding.method, SureToChange)
        and binding.method.nonzero_means_change(binding.settings)
        and all(sums.get(key) for key in binding.keys.values())
    }


def check_finite(tensors: Mapping[str, Tensor], origin: str) -> dict[str, float]:
    """Return the sum of each floating-point tensor; raise ``NonFiniteError`` when one of ``origin`` is not finite."""
    # The sum of a tensor is read off many times faster than each value; it is finite where all of them are, but for
    # values so large that a second look costs nothing.
    floating = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    if not floating:
        return {}
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in floating.values()])
    if bool(torch.isfinite(sums).all()):
        return dict(zip(floating, sums.tolist(), strict=True))
    bad = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise NonFiniteError(
            f"The adapter {origin} holds NaN or infinite values in {len(bad)} of {len(tensors)} tensors; the first "
            f"is {bad[0]}.",
            hint="Its training diverged or its file is damaged; take an earlier checkpoint.",
        )
    return {}
