"""Reads and writes the safetensors files of formats: whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.errors import OutputError
from veneer.files.atomic_write import atomic_write, flush, writing
from veneer.files.names import SAFETENSORS
from veneer.files.paths import exists
from veneer.files.safetensors_header import Header, read_header
from veneer.files.source import Source

if TYPE_CHECKING:
    from torch import Tensor


def header_of(source: Source, *names: str) -> Header | None:
    """Read the header of the safetensors file that a source is, or of the first of ``names`` in its folder.

    Raises:
        CorruptFileError: the file is damaged.
    """
    if source.file is not None:
        return read_header(source.file) if source.file.suffix == SAFETENSORS else None
    name = next((name for name in names if source.has(name)), None)
    return None if name is None else read_header(source.path(name))


def only_file(source: Source) -> str | None:
    """Return the name of the only safetensors file in a source's folder; ``None`` where there are none or several."""
    names = [name for name in source.files() if name.endswith(SAFETENSORS)]
    return names[0] if len(names) == 1 else None


def read_tensors(header: Header) -> dict[str, Tensor]:
    """Read all tensors of a file, each in its dtype."""
    from veneer.files.mapped_tensors import read_mapped

    return read_mapped(header, header.tensors)


def write_tensors(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, each tensor contiguous and in memory of its own.

    Raises:
        OutputError: it cannot be written; nothing is left behind.
    """
    from safetensors.torch import save_file

    separate = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    with atomic_write(target) as temporary:
        save_file(separate, temporary, metadata={"format": "pt", **metadata})
        flush(temporary)


def check_free(target: Path) -> None:
    """Raise ``OutputError`` where something is at the place of an output already, but for an empty folder."""
    if exists(target) and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} exists already.", hint="Give a path where nothing is yet.")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a hidden folder to write to, which becomes ``target`` when the block ends well.

    Raises:
        OutputError: ``target`` is taken, or cannot be written; nothing is left behind.
    """
    check_free(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.writing-") as hidden:
            folder = Path(hidden) / target.name
            folder.mkdir()
            yield folder
            folder.replace(target)
