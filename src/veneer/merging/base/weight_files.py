"""Reads a model's weights from disk by name, whole or by rows, without mapping the files into memory."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from veneer.errors import CorruptFileError, SourceError, UnsupportedError
from veneer.files.names import MODEL_STEM, SAFETENSORS
from veneer.files.safetensors_header import Header, TensorInfo
from veneer.files.source import Source
from veneer.files.torch_dtypes import DTYPES
from veneer.files.weight_files import read_checked_headers, weight_files
from veneer.merging.base.companion_files import check_inside
from veneer.merging.base.hashing import Stamp, check_unchanged, stamp_of

NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The dtypes of plain numbers; narrower ones are quantised forms.
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorPlace:
    """The place of a tensor: its file's name in the checkpoint, and its first byte there, ``start``."""

    file: str
    info: TensorInfo
    start: int


@dataclass
class WeightFiles:
    """The safetensors files of one checkpoint, open for reading until its ``with`` block ends.

    Args:
        headers: file's name -> its header. The name is the file's path from the checkpoint's folder, since shards in
            several folders may bear one name: ``one/w.safetensors``.

    Attributes:
        at_opening: file's name -> its stamp when it was opened.
    """

    headers: Mapping[str, Header]
    places: dict[str, TensorPlace] = field(init=False)

    def __post_init__(self) -> None:
        self.places = {
            name: TensorPlace(file, info, header.data_start + info.start)
            for file, header in self.headers.items()
            for name, info in header.tensors.items()
        }
        self.paths: dict[str, Path] = {file: header.path for file, header in self.headers.items()}
        self._open: dict[str, int] = {name: _opened(path) for name, path in self.paths.items()}
        self.at_opening = self.stamps()

    @classmethod
    def open(cls, source: Source) -> WeightFiles:
        """Open a full model's weight files.

        Raises:
            IncompleteCheckpointError: there are none. CorruptFileError: one is damaged, or is no safetensors file.
            SourceError: one cannot be read, or is a link that leaves the folder.
        """
        check_inside(source.root, weight_files(source, MODEL_STEM))
        headers = read_checked_headers(source, MODEL_STEM)
        by_file = {header.path.relative_to(source.root).as_posix(): header for header in headers}
        for file, header in by_file.items():
            _check_text(file, header)
        return cls(by_file)

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def with_places(self, places: dict[str, TensorPlace]) -> WeightFiles:
        """Return the same open files with other names for their tensors; both are closed together."""
        view = copy.copy(self)
        view.places = places
        return view

    def stamps(self) -> dict[str, Stamp]:
        """Return the stamp of each file by name, as it is now."""
        return {name: stamp_of(path) for name, path in self.paths.items()}

    def check_unchanged(self) -> None:
        """Raise ``MergeError`` when a file has changed since it was opened."""
        check_unchanged({self.paths[name]: stamp for name, stamp in self.at_opening.items()})

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype; raise ``UnsupportedError`` for one that torch has not."""
        dtype = self.places[name].info.dtype
        if dtype not in DTYPES:
            raise UnsupportedError(
                f"{name} is stored as {dtype}, which torch does not have.", hint="Use another copy of the base."
            )
        return DTYPES[dtype]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.places[name].info.shape

    def read(self, name: str) -> Tensor:
        """Read a whole tensor."""
        place = self.places[name]
        return self.tensor_bytes(name, 0, place.info.nbytes).view(self.dtype(name)).view(place.info.shape)

    def tensor_bytes(self, name: str, start: int, count: int) -> Tensor:
        """Read ``count`` bytes of a tensor from its byte ``start`` on, shape ``(count,)``, uint8."""
        return self.fill(torch.empty(count, dtype=torch.uint8), name, start)

    def fill(self, into: Tensor, name: str, start: int) -> Tensor:
        """Fill a contiguous tensor with a stored one's bytes, from its byte ``start`` on."""
        place = self.places[name]
        return read_exactly(self._open[place.file], self.paths[place.file], place.start + start, into)

    def file_bytes(self, file: str, start: int, count: int) -> Tensor:
        """Read ``count`` bytes of a file from its byte ``start`` on."""
        return read_exactly(self._open[file], self.paths[file], start, torch.empty(count, dtype=torch.uint8))

    def descriptor(self, file: str) -> int:
        """Return an open file's descriptor."""
        return self._open[file]

    def close(self) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.popitem()[1])


def _check_text(file: str, header: Header) -> None:
    """Raise ``CorruptFileError`` for a file that is no safetensors file, or whose header is no text."""
    texts = (*header.tensors, *header.metadata, *header.metadata.values())
    odd = next((text for text in texts if not _is_text(text)), None)
    if odd is not None or not file.endswith(SAFETENSORS):
        what = "it is no safetensors file" if odd is None else f"its header holds {odd!r}, which is no text"
        raise CorruptFileError(f"{header.path} is damaged: {what}.", hint="Copy or download it again.")


def _is_text(text: str) -> bool:
    """Tell whether UTF-8 can hold a text, which half a pair of surrogates rules out."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_exactly(descriptor: int, path: Path, start: int, into: Tensor) -> Tensor:
    """Fill a contiguous tensor with the bytes of an open file from ``start`` on."""
    view = into.view(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], start + done)
        except OSError as error:
            raise SourceError(
                f"{path} cannot be read: {error.strerror or error}.", hint="Check the disk that it lies on."
            ) from error
        if not count:
            raise CorruptFileError(f"{path} became shorter while it was read.", hint="Copy or download it again.")
        done += count
    return into


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read: {error.strerror or error}.", hint="Check its permissions."
        ) from error
