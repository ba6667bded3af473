"""Reads adapters that other writers saved as PEFT saves them today; needs nothing of the model.

...q_proj.lora_A.default.weight             the keys of a model in memory have the adapter's name in them
...classifier.modules_to_save.default.weight
score.weight, and "modules_to_save": null   PEFT up to 0.10 saved a task's head and did not say so
"""

from __future__ import annotations

from collections.abc import Mapping

from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.layouts.renamed_checkpoint import RenamedCheckpoint
from veneer.configs.base import PeftConfig, PromptConfig, TargetedConfig
from veneer.configs.methods.lora import LoraConfig
from veneer.configs.names import HEADS
from veneer.methods import method_of, prompt_of
from veneer.methods.base.abilities import specialised
from veneer.methods.base.method import around_adapter
from veneer.methods.shared.token_rows import TOKENS

_SAVED = ".modules_to_save."


def as_peft_writes(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the keys and the config that PEFT gives it now; the same one where it has them."""
    leaves = _leaves(checkpoint.config)
    endings = tuple("." + leaf for leaf in leaves.values())
    if all(key.endswith(endings) for key in checkpoint.tensors):
        return checkpoint
    return _with_heads(_without_name(checkpoint, leaves), endings)


def _leaves(config: PeftConfig) -> dict[str, str]:
    """Return how the keys of the method's tensors end: in memory, without the adapter's name -> on disk."""
    if isinstance(config, TargetedConfig):
        methods = [specialised(method_of(config), config), *([TOKENS] if isinstance(config, LoraConfig) else [])]
        return {method.leaf(name).memory_name: name for method in methods for name in method.disk_names}
    return {leaf.name: leaf.name for leaf in prompt_of(config).shared} if isinstance(config, PromptConfig) else {}


def _without_name(checkpoint: Checkpoint, leaves: Mapping[str, str]) -> Checkpoint:
    """Return a checkpoint without the adapter's name in its keys, where they all have the same."""
    parts = {key: _parts(key, leaves) for key in checkpoint.tensors}
    named = {key: part for key, part in parts.items() if part is not None and part[0] not in checkpoint.tensors}
    names = {name for _, name in named.values()}
    if len(names) != 1:
        return checkpoint
    old_keys = {named[key][0] if key in named else key: key for key in checkpoint.tensors}
    note = f"The keys of {len(named)} tensors have the adapter's name in them ({min(names)}): it is left out."
    return RenamedCheckpoint.of(checkpoint, old_keys, [note])


def _parts(key: str, leaves: Mapping[str, str]) -> tuple[str, str] | None:
    """Split a key into itself without the adapter's name, and the name; ``None`` for one that has none."""
    if any(key.endswith("." + leaf) for leaf in leaves.values()):
        return None
    module, saved, rest = key.partition(_SAVED)
    if saved and "." in rest:
        name, _, leaf = rest.partition(".")
        return f"{module}.{leaf}", name
    for inner, leaf in leaves.items():
        head, tail = around_adapter(inner)
        module, separator, rest = key.rpartition(f".{head}.")
        name, _, end = rest.partition(".")
        if separator and end == tail and name not in ("", "weight", "bias"):
            return f"{module}.{leaf}", name
    return None


def _with_heads(checkpoint: Checkpoint, endings: tuple[str, ...]) -> Checkpoint:
    """Name the task's heads that a checkpoint holds among its config's whole modules, and return the checkpoint.

    A config that the caller has given is completed itself, as in peft.
    """
    config = checkpoint.config
    if not isinstance(config, (TargetedConfig, PromptConfig)):
        return checkpoint
    modules = {word for key in checkpoint.tensors if not key.endswith(endings) for word in key.split(".")[:-1]}
    named = config.modules_to_save or []
    unnamed = [
        head
        for head in HEADS.get(str(config.task_type), ())
        if head not in named and any(word.endswith(head) for word in modules)
    ]
    if unnamed:
        config.modules_to_save = [*named, *unnamed]
    return checkpoint
