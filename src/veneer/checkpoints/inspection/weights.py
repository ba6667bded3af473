"""Counts the tensors of a checkpoint by the headers of its files, here or on the hub."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from veneer.checkpoints.inspection.facts import Problem, Weights
from veneer.checkpoints.inspection.problems import problem_of
from veneer.errors import SourceError, VeneerError
from veneer.files.names import INDEX, SAFETENSORS
from veneer.files.safetensors_header import Header, TensorInfo, read_header
from veneer.files.source import Source
from veneer.files.weight_files import check_shards, weight_files


def headers_of(source: Source, stem: str, problems: list[Problem]) -> list[Header]:
    """Read the headers that can be read; what keeps others from it joins ``problems``."""
    headers: list[Header] = []
    try:
        files = weight_files(source, stem)
    except VeneerError as error:
        code = {
            "PickleRefusedError": "pickle-only",
            "IncompleteCheckpointError": "missing-shard" if source.has(stem + INDEX) else "no-weights",
        }
        problems.append(problem_of(code.get(type(error).__name__, "damaged"), error))
        return []
    for file in files:
        try:
            headers.append(read_header(file))
        except SourceError as error:
            problems.append(problem_of("damaged", error))
    if len(headers) == len(files):
        try:
            check_shards(source, stem, headers)
        except SourceError as error:
            problems.append(problem_of("shards", error))
    return headers


def remote_headers(source: Source, token: str | None) -> list[Header] | None:
    """Read the headers from the hub, for a model whose weights are not in the cache."""
    if any(source.root.glob(f"*{SAFETENSORS}")):
        return None
    from huggingface_hub import HfApi

    try:
        metadata = HfApi(token=token).get_safetensors_metadata(source.origin, revision=source.commit)
    except Exception:  # whatever keeps the hub from answering: the local problem is then reported instead
        return None
    return [
        Header(
            Path(name),
            {n: TensorInfo(n, t.dtype, tuple(t.shape), *t.data_offsets) for n, t in file.tensors.items()},
            file.metadata,
        )
        for name, file in metadata.files_metadata.items()
    ]


def weights_of(headers: list[Header]) -> Weights:
    """Count the tensors and values under these headers."""
    tensors = [info for header in headers for info in header.tensors.values()]
    dtypes: Counter[str] = Counter()
    for info in tensors:
        dtypes[info.dtype] += info.numel
    return Weights(
        files=[header.path.name for header in headers],
        tensors=len(tensors),
        parameters=sum(dtypes.values()),
        nbytes=sum(info.nbytes for info in tensors),
        dtypes=dict(sorted(dtypes.items())),
    )
