"""Identifies a base model by a digest that an adapter can keep and a loader can compare.

It is taken from the safetensors headers and from samples of the data, so that it costs milliseconds; it does not
depend on sharding, on the order of tensors or on anything beside the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from veneer.errors import NotACheckpointError
from veneer.files.names import ADAPTER_CONFIG, ADAPTER_STEM, MODEL_CONFIG, MODEL_STEM
from veneer.files.resolve import resolve
from veneer.files.safetensors_header import TensorInfo
from veneer.files.source import Source
from veneer.files.weight_files import read_headers

if TYPE_CHECKING:
    import hashlib

# Where an adapter's safetensors header keeps the digest of its base.
BASE_DIGEST_KEY = "base_digest"

# Bytes per sample, and samples per tensor: at its start, its middle and its end.
_WINDOW = 64
_BLOCK = 1 << 22


def base_digest(base: Source | str | Path, *, full: bool = False) -> str:
    """Compute the digest of a full model's weights.

    Args:
        base: the model's folder.
        full: read every byte instead of samples. Its digests begin with ``sha256-full:`` and compare only with
            each other.

    Returns:
        ``"sha256:<hex>"``.

    Raises:
        SourceError: the weights are missing or damaged.
    """
    import hashlib  # 3 ms, which `veneer inspect`, needing the name above alone, does without

    source = base if isinstance(base, Source) else resolve(base, what="base")
    _check_is_no_adapter(source)
    where = {name: header for header in read_headers(source, MODEL_STEM) for name in header.tensors}
    digest = hashlib.sha256()
    files: dict[Path, BinaryIO] = {}
    try:
        for name in sorted(where):
            header = where[name]
            if header.path not in files:
                files[header.path] = header.path.open("rb", buffering=0)
            info = header.tensors[name]
            digest.update(f"{name}\0{info.dtype}\0{list(info.shape)}\0".encode())
            (_all if full else _samples)(digest, files[header.path], header.data_start + info.start, info)
    finally:
        for file in files.values():
            file.close()
    return f"{'sha256-full' if full else 'sha256'}:{digest.hexdigest()}"


def _check_is_no_adapter(source: Source) -> None:
    file = "" if source.file is None else source.file.name
    if file.startswith(ADAPTER_STEM) or (not file and source.has(ADAPTER_CONFIG) and not source.has(MODEL_CONFIG)):
        raise NotACheckpointError(
            f"{source.origin} is an adapter, and the digest is of a base model.",
            hint="Give the full model's folder; `veneer inspect` shows which base the adapter records, and "
            "`veneer digest --adapter` the digest that `veneer serve` gives it.",
        )


def _samples(digest: hashlib._Hash, file: BinaryIO, start: int, info: TensorInfo) -> None:
    last = max(info.nbytes - _WINDOW, 0)
    for offset in sorted({0, last // 2, last}):
        file.seek(start + offset)
        digest.update(file.read(min(_WINDOW, info.nbytes)))


def _all(digest: hashlib._Hash, file: BinaryIO, start: int, info: TensorInfo) -> None:
    file.seek(start)
    left = info.nbytes
    while left:
        block = file.read(min(_BLOCK, left))
        digest.update(block)
        left -= len(block)
