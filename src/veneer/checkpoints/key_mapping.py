"""``key_mapping``: a checkpoint whose keys are renamed by a caller's own regular expressions as it is loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.older_layouts import Remapped
from veneer.configs import patterns
from veneer.errors import ConfigError
from veneer.files.tensor_keys import PREFIX, SHARED_PREFIX


def with_keys(checkpoint: Checkpoint, mapping: Mapping[str, str]) -> Checkpoint:
    """``checkpoint`` under other keys.

    Args:
        checkpoint: what is to be loaded.
        mapping: regular expression -> what takes the place of what it finds in a key without its prefix; the first
            that finds something counts.

    Raises:
        ConfigError: one is no regular expression, or two keys become one.
    """
    for pattern in mapping:
        patterns.check("key_mapping", pattern, patterns.PART)
    renamed = {_renamed(key, mapping): key for key in checkpoint.tensors}
    if len(renamed) < len(checkpoint.tensors):
        twice = Counter(_renamed(key, mapping) for key in checkpoint.tensors).most_common(1)[0][0]
        raise ConfigError(f"key_mapping gives {twice} to several tensors.", hint="Let each keep a key of its own.")
    notes = checkpoint.notes
    if all(new == old for new, old in renamed.items()):
        notes = (*notes, "key_mapping fits none of the checkpoint's keys.")
    tensors = {new: checkpoint.tensors[old] for new, old in renamed.items()}
    return Remapped(
        checkpoint.origin, checkpoint.config, tensors, checkpoint.metadata, (), notes=notes, old=checkpoint,
        renamed=renamed,
    )  # fmt: skip


def _renamed(key: str, mapping: Mapping[str, str]) -> str:
    prefix = next((p for p in (PREFIX, SHARED_PREFIX) if key.startswith(p)), "")
    name = key.removeprefix(prefix)
    for pattern, replacement in mapping.items():
        new, found = re.subn(pattern, replacement, name)
        if found:
            return prefix + new
    return key
