"""Reads checkpoints of older layouts in the layout that a model has now.

transformers 5 keeps a layer's experts in one parameter, where version 4 had a module for each; it moved the parts of
vision-language models, and renamed the layers of image models. Its own rules for a base of an older version give a
module's name of now. Experts, and parts of which it has no rule, are found by structure:

    ...block_sparse_moe.experts.3.w1, .w3, .w2               -> ...mlp.experts, gate_up_proj and down_proj
    ...mlp.experts.3.gate_proj, .up_proj, .down_proj         -> the same
    vit.encoder.layer.0.attention.attention.query            -> vit.layers.0.attention.q_proj, by transformers' rules
    language_model.model.layers.0.self_attn.q_proj           -> model.language_model.layers.0.self_attn.q_proj

A layer that is never called (the ``out_proj`` inside ``nn.MultiheadAttention``) is left out: its adapter never acts.

Only keys whose module the model does not modules are touched, and the notes tell what was done.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache

from torch import nn

from veneer.base_model.catalog import Catalog
from veneer.base_model.targets import names_match
from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.layouts.closeness import Closeness
from veneer.checkpoints.layouts.current_names import current_names
from veneer.checkpoints.layouts.old_names import OldNames, as_named_now, kinds_of
from veneer.checkpoints.layouts.stacked_experts import RestackedCheckpoint, stack_experts
from veneer.configs.base import Names, TargetedConfig
from veneer.configs.methods.lora import LoraConfig
from veneer.files.tensor_keys import PREFIX
from veneer.methods import method_of
from veneer.methods.base.abilities import specialised

# Modules of peft's own, whose names may stand between a module's and a tensor's.
_BETWEEN = frozenset({"base_layer", "token_adapter", "modules_to_save", "original_module"})
# How many kinds of renamed modules a note tells at most.
_MAX_KINDS = 4


def in_current_layout(checkpoint: Checkpoint, catalog: Catalog) -> Checkpoint:
    """Return a checkpoint in the layout of the model; the same one where it already is, or where nothing fits."""
    config = checkpoint.config
    if not isinstance(config, TargetedConfig):
        return checkpoint
    heads = _heads(config)
    keys: dict[str, list[str]] = defaultdict(list)
    for key in checkpoint.tensors:
        keys[_module_of(key, heads)].append(key)
    unknown = [name for name in keys if name and name not in catalog.modules]
    routers = [name for name in keys if name in catalog.modules and _is_router(name, catalog)]
    if not unknown and not routers and catalog.never_called.isdisjoint(keys):
        return checkpoint
    moved = current_names(unknown, set(keys), catalog)
    now = RestackedCheckpoint.of(checkpoint, {key: key for key in checkpoint.tensors})
    now = _without_uncalled(_renamed(now, moved, keys, catalog), heads, catalog)
    if isinstance(config, LoraConfig):
        now = stack_experts(now, [name for name in unknown if name not in moved], keys, catalog)
        now = _with_router_parameters(now, [*routers, *(new for new in moved.values() if _is_router(new, catalog))])
    return now if now.notes != checkpoint.notes else checkpoint


def closeness(checkpoint: Checkpoint, catalog: Catalog) -> Closeness:
    """Tell how well the modules that a checkpoint names are the model's; a prompt names none."""
    config = checkpoint.config
    if not isinstance(config, TargetedConfig):
        return Closeness.EXACT
    heads, modules = _heads(config), {"", *catalog.modules}
    if modules.issuperset(_module_of(key, heads) for key in checkpoint.tensors):
        return Closeness.EXACT
    now = in_current_layout(checkpoint, catalog)
    fits = modules.issuperset(_module_of(key, heads) for key in now.tensors)
    return Closeness.RENAMED if fits else Closeness.NONE


def _heads(config: TargetedConfig) -> frozenset[str]:
    """Return the words that follow a module's name in a key."""
    return frozenset(leaf.partition(".")[0] for leaf in specialised(method_of(config), config).disk_names) | _BETWEEN


@lru_cache(maxsize=1 << 13)
def _module_of(key: str, heads: frozenset[str]) -> str:
    """Return the module that a key belongs to; an empty string for a tensor that all share."""
    if not key.startswith(PREFIX):
        return ""
    words = key[len(PREFIX) :].split(".")
    end = next((index for index, word in enumerate(words) if index and word in heads), len(words) - 1)
    return ".".join(words[:end])


# -- modules with other names ------------------------------------------------------------------------------


def _renamed(
    now: RestackedCheckpoint, moved: Mapping[str, str], keys: Mapping[str, list[str]], catalog: Catalog
) -> RestackedCheckpoint:
    """Return a checkpoint with the modules of ``moved`` (old name -> new name), and its config, by their new names."""
    if not moved:
        return now
    tensors, renamed = dict(now.tensors), {}
    for old, new in moved.items():
        for key in keys[old]:
            new_key = PREFIX + new + key[len(PREFIX) + len(old) :]
            tensors[new_key], renamed[new_key] = tensors.pop(key), key
    assert isinstance(now.config, TargetedConfig)
    adapted = {moved.get(name, name) for name in keys}
    config = as_named_now(now.config, OldNames(moved, catalog.modules), adapted, catalog)
    kinds = kinds_of(moved)
    summary = ", ".join(kinds[:_MAX_KINDS]) + (
        f" and {len(kinds) - _MAX_KINDS} more" if len(kinds) > _MAX_KINDS else ""
    )
    note = f"Older layout: {len(moved)} modules were found under other names: {summary}."
    return replace(now, config=config, tensors=tensors, renamed=renamed, notes=(*now.notes, note))


# -- layers that are never called --------------------------------------------------------------------------


def _without_uncalled(now: RestackedCheckpoint, heads: frozenset[str], catalog: Catalog) -> RestackedCheckpoint:
    """Return a checkpoint without the tensors of layers that are never called, unless there are no others."""
    leaf_words = heads - _BETWEEN
    uncalled: dict[str, list[str]] = defaultdict(list)
    for key in now.tensors:
        module = _module_of(key, heads)
        if module in catalog.never_called and key[len(PREFIX) + len(module) + 1 :].partition(".")[0] in leaf_words:
            uncalled[module].append(key)
    left_out = {key for keys in uncalled.values() for key in keys}
    if not left_out or left_out == now.tensors.keys():
        return now
    assert isinstance(now.config, TargetedConfig)
    config = replace(now.config, exclude_modules=_excluding(now.config.exclude_modules, uncalled))
    tensors = {key: info for key, info in now.tensors.items() if key not in left_out}
    first = min(uncalled)
    note = f"{len(uncalled)} layers that are adapted are never called, here or in PEFT, and left out (first: {first})."
    return replace(now, config=config, tensors=tensors, notes=(*now.notes, note))


def _excluding(excluded: Names | None, names: Iterable[str]) -> Names:
    """Return ``exclude_modules`` with more names."""
    if isinstance(excluded, str):
        return "|".join([f"({excluded})", *map(re.escape, names)])
    return {*(excluded or ()), *names}


# -- routers that are no linear layers now -----------------------------------------------------------------


def _is_router(name: str, catalog: Catalog) -> bool:
    """Tell whether a module was a linear layer once, and returns more than one tensor now."""
    module = catalog.modules[name]
    weight = module._parameters.get("weight")
    if not name.endswith((".gate", ".router")) or weight is None or weight.ndim != 2:
        return False
    other_forward = type(module).forward is not nn.Linear.forward and weight.is_floating_point()
    return not catalog.sites_at(name) or (isinstance(module, nn.Linear) and other_forward)


def _with_router_parameters(now: RestackedCheckpoint, routers: Iterable[str]) -> RestackedCheckpoint:
    """Return a checkpoint whose config adapts routers as parameters; their keys stay."""
    config = now.config
    assert isinstance(config, LoraConfig)
    named = [f"{name}.weight" for name in routers if not names_match(f"{name}.weight", config.target_parameters or ())]
    if not named:
        return now
    targets = config.target_modules
    other_targets = (
        {t for t in targets if not any(names_match(n.removesuffix(".weight"), [t]) for n in named)}
        if isinstance(targets, (set, list))
        else targets
    )
    config = replace(
        config, target_modules=other_targets, target_parameters=[*(config.target_parameters or ()), *named]
    )
    note = f"Older layout: {len(named)} routers are adapted as parameters, being no linear layers now."
    return replace(now, config=config, notes=(*now.notes, note))
