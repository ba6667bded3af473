"""Restores, from a merged folder, the base that it was made from, byte for byte.

Either the base itself is there to be copied and compared with the manifest, or the merge was made with
``reversible=True`` and kept, in ``merge_delta/``, the difference of the base's bytes from the output's:

    merge_delta/<weight file of the base>.zip    its header; for each tensor that differs, blocks of XOR
    merge_delta/small.zip                        the companion files that differ or were not copied

The bytes of a block lie by significance, all high bytes first, since those hardly differ; then zlib.
"""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from veneer.adapters.merge.cores import cores
from veneer.errors import CorruptFileError, MergeError, OutputError, VeneerError
from veneer.files.atomic_write import writing
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import DTYPE_BITS
from veneer.files.resolve import resolve
from veneer.files.safetensors_header import header_in
from veneer.files.source import Source
from veneer.keywords import takes
from veneer.merging.base.companion_files import check_inside
from veneer.merging.base.hashing import matches
from veneer.merging.base.weight_files import WeightFiles
from veneer.merging.output.manifest import read_manifest
from veneer.merging.output.staging import staging_folder
from veneer.merging.output.target import DELTA, check_apart, check_space, check_target, written_to
from veneer.printing import Report, nbytes

_SMALL = "small.zip"
_BLOCK = 1 << 22
# Bytes that a header, or the list of its tensors, may have.
_MAX_HEADER = 1 << 27


@dataclass(frozen=True)
class UnmergeReport(Report):
    """The result of an unmerge.

    Attributes:
        merged: the merged folder.
        out: the folder that was written.
        source: the origin of the bytes.
        files: the files' names; each has the digest of the base's file.
        nbytes: bytes written.
    """

    merged: str
    out: str
    source: str
    files: list[str]
    nbytes: int

    _title = "unmerge report"

    def _facts(self) -> list[tuple[str, str]]:
        return [
            ("merged", self.merged),
            ("restored from", self.source),
            ("out", f"{self.out}: {len(self.files)} files, {nbytes(self.nbytes)}, every byte the base's"),
        ]


@takes()
def unmerge(
    merged: str | Path,
    *,
    out: str | Path,
    base: str | Path | None = None,
    overwrite: bool = False,
    local_files_only: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
) -> UnmergeReport:
    """Write the base that a merged folder was made from, and compare every file's digest with the manifest's.

    Args:
        merged: the merged folder.
        out: the folder to write; it appears only when it is complete and right.
        base: the base to copy; without it the delta of a reversible merge is used.
        overwrite: replace a model that is at ``out``.
        local_files_only: never use the network.
        on_step: called with the name of each step as it begins.

    Raises:
        OutputError: ``out`` is taken or cannot be written. MergeError: ``base`` is another, there is no delta, or what
            is restored is not the base. SourceError: a folder cannot be read.
    """
    folder, target = Path(merged), written_to(out)
    check_target(target, overwrite)
    manifest = read_manifest(folder)
    digests: dict[str, str] = manifest["base"]["digests"]
    lookup = LookupOptions(local_files_only=local_files_only)
    origin = None if base is None else resolve(base, lookup, what="base")
    if origin is None and not (folder / DELTA).is_dir():
        raise MergeError(
            f"{folder} was not merged with --reversible, so the base's bytes are not in it.",
            hint=f"Give the base: --base {manifest['base']['origin']}",
        )
    check_apart(target, [("merged folder", folder), *([] if origin is None else [("base", origin.root)])])
    on_step("restoring")
    with writing(target, missing=OutputError), staging_folder(target, {}, False, overwrite) as staging:
        if origin is not None:
            _copy(origin, staging.model, digests)
        else:
            _rebuild(folder, staging.model, digests)
        _check(staging.model, digests)
        staging.commit()
    return UnmergeReport(
        str(folder),
        str(target),
        f"the delta in {folder / DELTA}" if origin is None else origin.origin,
        sorted(digests),
        sum((target / name).stat().st_size for name in digests),
    )


def _copy(origin: Source, folder: Path, digests: dict[str, str]) -> None:
    missing = [name for name in digests if not origin.has(name)]
    if missing:
        raise MergeError(
            f"{origin.origin} is not the base of this merge: it has no {missing[0]}.",
            hint="Give the one it was made from.",
        )
    check_inside(origin.root, map(origin.path, digests))
    check_space(folder, sum(origin.path(name).stat().st_size for name in digests))
    for name in digests:
        shutil.copyfile(origin.path(name), _in_made_folder(folder / name))


def _in_made_folder(path: Path) -> Path:
    """Return a path to write to, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _check(folder: Path, digests: dict[str, str]) -> None:
    wrong = [name for name, digest in digests.items() if not matches(folder / name, digest)]
    if wrong:
        raise MergeError(
            f"{wrong[0]} is not what the manifest records of the base; nothing was written.",
            hint="Give the base that was merged, or a merged folder that nothing changed since.",
        )


# -- the delta -------------------------------------------------------------------------------------------------


def write_delta(base_files: WeightFiles, merged: Path, companions: Mapping[str, Path]) -> None:
    """Write the difference of the base's bytes from those of a merged folder into that folder.

    Args:
        base_files: the base's weight files.
        merged: the merged folder, complete.
        companions: the files beside the base's weights: name -> path.
    """
    delta = merged / DELTA
    delta.mkdir(exist_ok=True)
    with WeightFiles.open(resolve(merged)) as merged_files:
        for file in base_files.headers:
            _write_archive(file, base_files, merged_files, delta / _archive_of(file))
    with zipfile.ZipFile(delta / _SMALL, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in companions.items():
            if not (merged / name).is_file() or (merged / name).read_bytes() != path.read_bytes():
                archive.write(path, name)


def _archive_of(file: str) -> str:
    """Return the name of a weight file's archive, which holds the path of a file in a folder."""
    return file.replace("%", "%25").replace("/", "%2F") + ".zip"


def _write_archive(file: str, base: WeightFiles, merged_files: WeightFiles, target: Path) -> None:
    header = base.headers[file]
    entries: dict[str, list[Any]] = {}
    with zipfile.ZipFile(target, "w") as archive, ThreadPoolExecutor(cores()) as pool:
        archive.writestr("header", base.file_bytes(file, 0, header.data_start).numpy().tobytes())
        for number, name in enumerate(header.tensors):
            alike = _alike(name, base, merged_files)
            starts = range(0, base.places[name].info.nbytes, _BLOCK)
            for first in range(0, len(starts), cores()):
                some = starts[first : first + cores()]
                packed = pool.map(
                    lambda start, name=name, alike=alike: _packed(name, start, base, merged_files, alike), some
                )
                for count, data in enumerate(packed, start=first):
                    if data is not None:
                        archive.writestr(f"{number}/{count}", data)
            entries[name] = [number, alike]
        archive.writestr("tensors.json", json.dumps(entries))


def _alike(name: str, base: WeightFiles, merged_files: WeightFiles) -> bool:
    """Tell whether both folders have the tensor in the same number of bytes."""
    return name in merged_files and merged_files.places[name].info.nbytes == base.places[name].info.nbytes


def _packed(name: str, start: int, base: WeightFiles, merged_files: WeightFiles, alike: bool) -> bytes | None:
    """Return the compressed difference of a block of the base's tensor from the output's; ``None`` for none."""
    info = base.places[name].info
    count = min(_BLOCK, info.nbytes - start)
    block = base.tensor_bytes(name, start, count)
    if alike:
        block ^= merged_files.tensor_bytes(name, start, count)
    if not bool(block.any()):
        return None
    size = max(1, DTYPE_BITS[info.dtype] // 8)
    return zlib.compress(block.view(-1, size).T.contiguous().numpy().tobytes(), 1)


def _rebuild(merged: Path, folder: Path, digests: Mapping[str, str]) -> None:
    """Write the base's files that the manifest names, from a merged folder and its delta."""
    delta = merged / DELTA
    with WeightFiles.open(resolve(merged)) as merged_files:
        try:
            check_inside(merged, [delta / _SMALL, *(path for path in delta.iterdir() if path.is_symlink())])
            with zipfile.ZipFile(delta / _SMALL) as small:
                check_space(folder, sum(info.file_size for info in small.infolist()))
                for name in digests:
                    _rebuild_file(name, small, merged, merged_files, _in_made_folder(folder / name))
        except Exception as error:  # damaged archives make zipfile, zlib and torch fail in any way they can
            if isinstance(error, VeneerError) or (isinstance(error, OSError) and error.errno is not None):
                raise
            raise CorruptFileError(f"{delta} is damaged: {error}.", hint="Give the base instead: --base ...") from error


def _rebuild_file(name: str, small: zipfile.ZipFile, merged: Path, merged_files: WeightFiles, target: Path) -> None:
    """Write one of the base's files: it is stored whole, or in the delta, or is the merged folder's own."""
    archive = merged / DELTA / _archive_of(name)
    if name in small.namelist():
        with small.open(name) as member, target.open("wb") as out:
            shutil.copyfileobj(member, out)
    elif archive.is_file():
        with zipfile.ZipFile(archive) as opened, target.open("wb") as out:
            _rebuild_weights(opened, merged_files, target, out)
    elif (merged / name).is_file():
        check_inside(merged, [merged / name])
        shutil.copyfile(merged / name, target)


def _rebuild_weights(archive: zipfile.ZipFile, merged_files: WeightFiles, target: Path, out: BinaryIO) -> None:
    header = header_in(_member(archive, "header", _MAX_HEADER), target)
    check_space(target, header.data_start + header.nbytes)
    out.write(_member(archive, "header", _MAX_HEADER))
    entries, members = json.loads(_member(archive, "tensors.json", _MAX_HEADER)), set(archive.namelist())
    for name, info in sorted(header.tensors.items(), key=lambda item: item[1].start):
        number, alike = entries[name]
        if alike and merged_files.places[name].info.nbytes != info.nbytes:
            raise ValueError(f"{name} has another size in the merged folder")
        size = max(1, DTYPE_BITS[info.dtype] // 8)
        for count, position in enumerate(range(0, info.nbytes, _BLOCK)):
            length = min(_BLOCK, info.nbytes - position)
            member = f"{number}/{count}"
            block = (
                merged_files.tensor_bytes(name, position, length) if alike else torch.zeros(length, dtype=torch.uint8)
            )
            if member in members:
                block ^= _unpacked(_member(archive, member, 2 * _BLOCK), size, length)
            out.write(block.numpy().data)


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """Read a member of an archive, up to as many bytes as it may have."""
    with archive.open(name) as file:
        return file.read(limit)


def _unpacked(data: bytes, size: int, length: int) -> Tensor:
    """Decompress a block of ``length`` bytes, and no more than that."""
    raw = bytearray(zlib.decompressobj().decompress(data, length + 1))
    if len(raw) != length:
        raise ValueError(f"a block of {length} bytes has another size")
    return torch.frombuffer(raw, dtype=torch.uint8).view(size, -1).T.contiguous().view(-1)
