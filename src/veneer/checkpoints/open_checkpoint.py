"""Opens an adapter on disk: reads its config, and the headers of its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from veneer.checkpoints.checkpoint import Checkpoint, in_memory_checkpoint
from veneer.checkpoints.layouts.spellings import as_peft_writes
from veneer.configs.base import PeftConfig
from veneer.errors import IncompleteCheckpointError, UsageError
from veneer.files.names import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_STEM, ADAPTER_WEIGHTS
from veneer.files.source import Source
from veneer.files.weight_files import read_checked_headers
from veneer.formats.expert_layouts import is_in_question
from veneer.formats.foreign import check_is_adapter_file, foreign
from veneer.formats.format import Base, Format, ReadOptions
from veneer.formats.peft import PeftFormat
from veneer.packages import stands_in_for_peft


def open_checkpoint(
    source: Source,
    *,
    strict: bool = True,
    config: PeftConfig | None = None,
    base: Callable[[], Base | None] = lambda: None,
) -> Checkpoint:
    """Read an adapter's config (unless one is given) and header; of another tool's adapter, all of it.

    Args:
        source: the adapter.
        strict: raise on a key of its config that is unknown and may change the maths; else warn.
        config: used in place of its own.
        base: gives the facts of its base, which some formats of other tools need.

    Raises:
        IncompleteCheckpointError: the config, the weights or every tensor is missing.
        SourceError: a file cannot be read; ConfigError: the config is wrong, or not supported.
    """
    other_format = foreign(source)
    if other_format is not None:
        return _from_other_format(source, other_format, config, base())
    check_is_adapter_file(source)
    if not source.has(ADAPTER_CONFIG):
        raise IncompleteCheckpointError(
            f"{source.origin}: there is no {ADAPTER_CONFIG}, so this is no adapter.",
            hint=f"`veneer inspect {source.origin}` tells what is there.",
        )
    values = source.json(ADAPTER_CONFIG)
    if is_in_question(values) and source.has(ADAPTER_WEIGHTS):
        return _read_whole(source, PeftFormat(), config, base())
    if config is None:
        config = PeftConfig.from_dict(values, where=f"{source.origin}/{ADAPTER_CONFIG}", strict=strict)
    checkpoint = _from_pickle(source, config) if _is_read_as_pickle(source) else _from_headers(source, config)
    if not sum(info.numel for info in checkpoint.tensors.values()):
        raise IncompleteCheckpointError(
            f"{source.origin}: empty checkpoint: {ADAPTER_WEIGHTS} holds no values.",
            hint="Training under ZeRO-3 or FSDP saves this when the weights are not gathered first; save again "
            "with stage3_gather_16bit_weights_on_model_save, or gather before saving.",
        )
    return replace(as_peft_writes(checkpoint), source=source)


def _from_other_format(
    source: Source, other_format: Format, config: PeftConfig | None, base: Base | None
) -> Checkpoint:
    """Read an adapter of another tool into PEFT's layout."""
    checkpoint = _read_whole(source, other_format, config, base)
    return replace(checkpoint, notes=(f"It was read from a file of {other_format.title}.", *checkpoint.notes))


def _read_whole(source: Source, own_format: Format, config: PeftConfig | None, base: Base | None) -> Checkpoint:
    """Read an adapter by way of the canonical form."""
    from veneer.formats.peft_layout import laid_out

    adapters = own_format.read(source, ReadOptions(base=base))
    if len(adapters) > 1:
        raise UsageError(
            f"{source.origin} holds adapters of several models: {', '.join(adapters)}.",
            hint=f"Take one out first: veneer convert {source.origin} NEW --component {next(iter(adapters))}",
        )
    adapter = next(iter(adapters.values()))
    own_config, tensors = laid_out(adapter, base)
    checkpoint = in_memory_checkpoint(config or own_config, tensors, source.origin)
    return replace(checkpoint, metadata=adapter.metadata, notes=adapter.notes, source=source)


def _from_headers(source: Source, config: PeftConfig) -> Checkpoint:
    headers = read_checked_headers(source, ADAPTER_STEM)
    tensors = {name: info for header in headers for name, info in header.tensors.items()}
    metadata = {key: value for header in headers for key, value in header.metadata.items()}
    return Checkpoint(source.origin, config, tensors, metadata, tuple(headers))


def _is_read_as_pickle(source: Source) -> bool:
    """Tell whether a checkpoint has a pickle alone, and is read where Veneer stands in for peft, which reads it."""
    if source.file is not None or source.has(ADAPTER_WEIGHTS) or not source.has(ADAPTER_PICKLE):
        return False
    return stands_in_for_peft()


def _from_pickle(source: Source, config: PeftConfig) -> Checkpoint:
    """Open the pickle of an adapter; one that holds more than tensors is refused."""
    from veneer.files.convert_pickle import read_pickle

    return in_memory_checkpoint(config, read_pickle(source.path(ADAPTER_PICKLE)), source.origin)
