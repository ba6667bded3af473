"""Adapters as other writers spell them, read as PEFT writes them today; nothing of the model is needed for it.

...q_proj.lora_A.default.weight             the keys of a model in memory have the adapter's name in them
...classifier.modules_to_save.default.weight
score.weight, and "modules_to_save": null   PEFT up to 0.10 saved a task's head and did not say so
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.renamed_checkpoint import RenamedCheckpoint
from veneer.configs.base import PeftConfig, PromptConfig, TargetedConfig
from veneer.configs.methods.lora import LoraConfig
from veneer.configs.names import HEADS
from veneer.methods import method_of, prompt_of
from veneer.methods.base.abilities import specialised
from veneer.methods.shared.token_rows import TOKENS

if TYPE_CHECKING:
    pass


_SAVED = ".modules_to_save."


def as_peft_writes(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` with the keys and the config that PEFT gives it now; itself where it has them."""
    leaves = _leaves(checkpoint.config)
    endings = tuple("." + leaf for leaf in leaves.values())
    if all(key.endswith(endings) for key in checkpoint.tensors):
        return checkpoint
    return _with_heads(_without_name(checkpoint, leaves), endings)


def _leaves(config: PeftConfig) -> dict[str, str]:
    """What the key of a tensor of the method's own ends with, in memory (but for the adapter's name) -> on disk."""
    if isinstance(config, TargetedConfig):
        methods = [specialised(method_of(config), config), *([TOKENS] if isinstance(config, LoraConfig) else [])]
        return {method.leaf(name).memory_name: name for method in methods for name in method.disk_names}
    return {leaf.name: leaf.name for leaf in prompt_of(config).shared} if isinstance(config, PromptConfig) else {}


def _without_name(checkpoint: Checkpoint, leaves: Mapping[str, str]) -> Checkpoint:
    """Without the adapter's name, where it stands in the keys and is one."""
    parts = {key: _parts(key, leaves) for key in checkpoint.tensors}
    found = {key: part for key, part in parts.items() if part is not None and part[0] not in checkpoint.tensors}
    names = {name for _, name in found.values()}
    if len(names) != 1:
        return checkpoint
    new = {key: found[key][0] if key in found else key for key in checkpoint.tensors}
    note = f"The keys of {len(found)} tensors have the adapter's name in them ({min(names)}): it is left out."
    return RenamedCheckpoint.of(checkpoint, {new[key]: key for key in checkpoint.tensors}, [note])


def _parts(key: str, leaves: Mapping[str, str]) -> tuple[str, str] | None:
    """A key without the adapter's name, and the name; ``None`` for one that has none."""
    if any(key.endswith("." + leaf) for leaf in leaves.values()):
        return None
    module, saved, rest = key.partition(_SAVED)
    if saved and "." in rest:
        name, _, leaf = rest.partition(".")
        return f"{module}.{leaf}", name
    for inner, leaf in leaves.items():
        head, _, tail = inner.partition(".")
        module, found, rest = key.rpartition(f".{head}.")
        name, _, end = rest.partition(".")
        if found and end == tail and name not in ("", "weight", "bias"):
            return f"{module}.{leaf}", name
    return None


def _with_heads(checkpoint: Checkpoint, endings: tuple[str, ...]) -> Checkpoint:
    """With the task's heads that it holds among the modules that it brings whole."""
    config = checkpoint.config
    if not isinstance(config, (TargetedConfig, PromptConfig)):
        return checkpoint
    modules = {word for key in checkpoint.tensors if not key.endswith(endings) for word in key.split(".")[:-1]}
    named = config.modules_to_save or []
    held = [
        head
        for head in HEADS.get(str(config.task_type), ())
        if head not in named and any(word.endswith(head) for word in modules)
    ]
    return replace(checkpoint, config=replace(config, modules_to_save=[*named, *held])) if held else checkpoint
