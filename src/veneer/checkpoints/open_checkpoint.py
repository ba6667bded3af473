"""Opens an adapter on disk: reads its config, and the headers of its weights."""

from __future__ import annotations

from dataclasses import replace

from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.layouts.spellings import as_peft_writes
from veneer.configs.base import PeftConfig
from veneer.errors import IncompleteCheckpointError
from veneer.files.names import ADAPTER_CONFIG, ADAPTER_STEM, ADAPTER_WEIGHTS
from veneer.files.source import Source
from veneer.files.weight_files import read_checked_headers


def open_checkpoint(source: Source, *, strict: bool = True, config: PeftConfig | None = None) -> Checkpoint:
    """Read an adapter folder's config (unless one is given) and header.

    Raises:
        IncompleteCheckpointError: the config, the weights or every tensor is missing.
        SourceError: a file cannot be read; ConfigError: the config is wrong, or not supported.
    """
    if not source.has(ADAPTER_CONFIG):
        raise IncompleteCheckpointError(
            f"{source.origin}: there is no {ADAPTER_CONFIG}, so this is no adapter.",
            hint=f"`veneer inspect {source.origin}` tells what is there.",
        )
    if config is None:
        where = f"{source.origin}/{ADAPTER_CONFIG}"
        config = PeftConfig.from_dict(source.json(ADAPTER_CONFIG), where=where, strict=strict)
    headers = read_checked_headers(source, ADAPTER_STEM)
    tensors = {name: info for header in headers for name, info in header.tensors.items()}
    if not sum(info.numel for info in tensors.values()):
        raise IncompleteCheckpointError(
            f"{source.origin}: empty checkpoint: {ADAPTER_WEIGHTS} holds no values.",
            hint="Training under ZeRO-3 or FSDP saves this when the weights are not gathered first; save again "
            "with stage3_gather_16bit_weights_on_model_save, or gather before saving.",
        )
    metadata = {key: value for header in headers for key, value in header.metadata.items()}
    checkpoint = as_peft_writes(Checkpoint(source.origin, config, tensors, metadata, tuple(headers)))
    return replace(checkpoint, source=source)
