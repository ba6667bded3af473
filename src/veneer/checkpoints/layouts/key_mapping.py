"""Applies ``key_mapping``, a caller's regular expressions, to the keys of a checkpoint."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.layouts.renamed_checkpoint import RenamedCheckpoint
from veneer.configs import patterns
from veneer.errors import ConfigError
from veneer.files.tensor_keys import PREFIX, SHARED_PREFIX


def with_keys(checkpoint: Checkpoint, mapping: Mapping[str, str]) -> Checkpoint:
    """Put a checkpoint under the keys that a caller's regular expressions make of its own.

    Args:
        checkpoint: the checkpoint that is loaded.
        mapping: regular expression -> what takes the place of what it finds in a key without its prefix; the first
            that finds something counts.

    Raises:
        ConfigError: one is no regular expression, or two keys become one.
    """
    for pattern in mapping:
        patterns.check("key_mapping", pattern, patterns.PART)
    keys = {_renamed(key, mapping): key for key in checkpoint.tensors}
    if len(keys) < len(checkpoint.tensors):
        twice = Counter(_renamed(key, mapping) for key in checkpoint.tensors).most_common(1)[0][0]
        raise ConfigError(f"key_mapping gives {twice} to several tensors.", hint="Let each keep a key of its own.")
    fits = any(new != old for new, old in keys.items())
    return RenamedCheckpoint.of(checkpoint, keys, () if fits else ["key_mapping fits none of the checkpoint's keys."])


def _renamed(key: str, mapping: Mapping[str, str]) -> str:
    prefix = next((p for p in (PREFIX, SHARED_PREFIX) if key.startswith(p)), "")
    name = key.removeprefix(prefix)
    for pattern, replacement in mapping.items():
        new, count = re.subn(pattern, replacement, name)
        if count:
            return prefix + new
    return key
