"""Lists the weight files of a checkpoint, whole or in shards, and reads their headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from veneer.errors import CorruptFileError, IncompleteCheckpointError, PickleRefusedError
from veneer.files.json_file import COPY_AGAIN
from veneer.files.names import INDEX, SAFETENSORS
from veneer.files.safetensors_header import Header, read_header
from veneer.files.source import PICKLES, Source


def read_headers(source: Source, stem: str) -> list[Header]:
    """Read the headers of a checkpoint's safetensors files, in the files' order.

    Args:
        source: the checkpoint.
        stem: ``"model"`` or ``"adapter_model"``.

    Raises:
        CorruptFileError: a file is damaged. SourceError: see :func:`weight_files`.
    """
    return [read_header(path) for path in weight_files(source, stem)]


def read_checked_headers(source: Source, stem: str) -> list[Header]:
    """Read the headers as :func:`read_headers` does, and compare the shards with their index.

    Raises:
        CorruptFileError: they contradict each other.
    """
    headers = read_headers(source, stem)
    check_shards(source, stem, headers)
    return headers


def check_shards(source: Source, stem: str, headers: Sequence[Header]) -> None:
    """Raise ``CorruptFileError`` when a tensor is in two shards, or the index says other than their headers."""
    paths: dict[str, Path] = {}
    for header in headers:
        for name in header.tensors:
            if name in paths:
                raise CorruptFileError(
                    f"{source.origin}: {name} is in two files, {paths[name].name} and {header.path.name}.",
                    hint=COPY_AGAIN,
                )
            paths[name] = header.path
    if source.file is None and not source.has(stem + SAFETENSORS):
        _check_index(source, stem + INDEX, paths)


def _check_index(source: Source, index: str, actual_paths: Mapping[str, Path]) -> None:
    mapping = source.json(index)["weight_map"]
    paths = {name: source.path(str(file)) for name, file in mapping.items()}
    odd = [name for name in paths.keys() | actual_paths.keys() if paths.get(name) != actual_paths.get(name)]
    if odd:
        name = min(odd)
        indexed = f"in {mapping[name]}" if name in mapping else "nowhere"
        actual = f"in {actual_paths[name].relative_to(source.root)}" if name in actual_paths else "in no file"
        more = f", and {len(odd) - 1} more alike" if len(odd) > 1 else ""
        raise CorruptFileError(
            f"{source.origin}/{index} has {name} {indexed}, and it is {actual}{more}.",
            hint="Copy or download index and shards again.",
        )


def weight_files(source: Source, stem: str) -> list[Path]:
    """List the safetensors files of a checkpoint: one, or the shards that an index names.

    Args:
        source: the checkpoint.
        stem: ``"model"`` or ``"adapter_model"``.

    Raises:
        IncompleteCheckpointError: there are none, or a shard is missing. PickleRefusedError: only pickles.
    """
    if source.file is not None:
        return [source.file]
    if source.has(stem + SAFETENSORS):
        return [source.path(stem + SAFETENSORS)]
    if source.has(stem + INDEX):
        return shards(source, stem + INDEX)
    pickles = [name for name in PICKLES[stem] if source.has(name)]
    if pickles:
        raise PickleRefusedError(
            f"{source.origin}: the weights are there only as a pickle ({pickles[0]}), which can run code.",
            hint=f"If you trust it: veneer convert-pickle {source.origin}",
        )
    raise IncompleteCheckpointError(
        f"{source.origin}: there is a config and no weights ({stem}{SAFETENSORS}).",
        hint="Copy the weights there; a training run that was cut off may not have saved them.",
    )


def shards(source: Source, index: str) -> list[Path]:
    """List the files that an index names, sorted by name.

    Raises:
        CorruptFileError: the index names none, or one outside of its folder.
        IncompleteCheckpointError: files are missing.
    """
    mapping = source.json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CorruptFileError(f"{source.origin}/{index}: has no weight_map.", hint=COPY_AGAIN)
    names = sorted({str(name) for name in mapping.values()})
    missing = [name for name in names if not source.has(name)]
    if missing:
        raise IncompleteCheckpointError(
            f"{source.origin}/{index}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}.",
            hint="Copy or download them again.",
        )
    return [source.path(name) for name in names]
