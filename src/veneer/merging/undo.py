"""Back from a merged folder to the base that it was made from, byte for byte.

Either the base itself is there to be copied and compared with the manifest, or the merge was made with
``reversible=True`` and kept, in ``merge_delta/``, what tells the base's bytes from the output's:

    merge_delta/<weight file of the base>.zip    its header; for each tensor that differs, blocks of XOR
    merge_delta/small.zip                        the small files that differ or did not come along

The bytes of a block lie by significance, all high bytes first, since those hardly differ; then zlib.
"""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.errors import CorruptFileError, MergeError, VeneerError
from veneer.merging.base_files import WeightFiles
from veneer.merging.cores import cores
from veneer.merging.hashing import sha256_of
from veneer.merging.manifest import read_manifest
from veneer.merging.output import check_space, check_target, told_as_merge_error, workshop
from veneer.panel import panel
from veneer.source import DTYPE_BITS, MODEL_STEM, Header, Source, read_header, resolve, weight_files

if TYPE_CHECKING:
    from rich.console import RenderableType

DELTA = "merge_delta"
_SMALL = "small.zip"
_BLOCK = 1 << 22


@dataclass(frozen=True)
class UnmergeReport:
    """What was restored.

    Attributes:
        merged: the merged folder.
        out: the folder that was written.
        source: where the bytes came from.
        files: their names; each has the SHA-256 that the base's had.
        nbytes: bytes written.
    """

    merged: str
    out: str
    source: str
    files: list[str]
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        """A panel with one row a fact."""
        facts = [
            ("merged", self.merged),
            ("restored from", self.source),
            ("out", f"{self.out}: {len(self.files)} files, {self.nbytes / 1e6:.1f} MB, every byte the base's"),
        ]
        return panel("unmerge report", facts)


def unmerge(
    merged: str | Path,
    *,
    out: str | Path,
    base: str | Path | None = None,
    overwrite: bool = False,
    local_files_only: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
) -> UnmergeReport:
    """Write the base that a merged folder was made from. Every file's SHA-256 is compared with the manifest's.

    Args:
        merged: the merged folder.
        out: the folder to write; it appears only when it is complete and right.
        base: the base to copy; without it the delta of a reversible merge is used.
        overwrite: replace a model that is at ``out``.
        local_files_only: never use the network.
        on_step: called with what begins now.

    Raises:
        MergeError: ``base`` is another, there is no delta, or what is restored is not the base. SourceError: a
            folder cannot be read.
    """
    folder, target = Path(merged), Path(out)
    check_target(target, overwrite)
    manifest = read_manifest(folder)
    digests: dict[str, str] = manifest["base"]["sha256"]
    origin = None if base is None else resolve(base, what="base", local_files_only=local_files_only)
    if origin is None and not (folder / DELTA).is_dir():
        raise MergeError(
            f"{folder} was not merged with --reversible, so the base's bytes are not in it.",
            hint=f"Give the base: --base {manifest['base']['origin']}",
        )
    if target.resolve() in (folder.resolve(), None if origin is None else origin.root.resolve()):
        raise MergeError(f"{target} is where the bytes come from.", hint="Choose another folder.")
    on_step("restoring")
    with told_as_merge_error(target), workshop(target, {}, False) as shop:
        if origin is not None:
            _copy(origin, shop.model, digests)
        else:
            _rebuild(folder, shop.model)
        _check(shop.model, digests)
        shop.commit()
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
    check_space(folder, sum(origin.path(name).stat().st_size for name in digests))
    for name in digests:
        shutil.copyfile(origin.path(name), folder / name)


def _check(folder: Path, digests: dict[str, str]) -> None:
    wrong = [n for n, digest in digests.items() if not (folder / n).is_file() or sha256_of(folder / n) != digest]
    if wrong:
        raise MergeError(
            f"{wrong[0]} is not what the manifest records of the base; nothing was written.",
            hint="Give the base that was merged, or a merged folder that nothing changed since.",
        )


# -- the delta -------------------------------------------------------------------------------------------------


def write_delta(base_files: WeightFiles, merged: Path, small: list[Path]) -> None:
    """Write what tells the base's bytes from those of a merged folder into it.

    Args:
        base_files: the base's weight files.
        merged: the merged folder, complete.
        small: the files beside the base's weights.
    """
    delta = merged / DELTA
    delta.mkdir(exist_ok=True)
    own = _open(merged)
    try:
        for header in base_files.headers:
            _write_archive(header, base_files, own, delta / f"{header.path.name}.zip")
    finally:
        own.close()
    with zipfile.ZipFile(delta / _SMALL, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in small:
            if not (merged / path.name).is_file() or (merged / path.name).read_bytes() != path.read_bytes():
                archive.write(path, path.name)


def _open(folder: Path) -> WeightFiles:
    return WeightFiles([read_header(path) for path in weight_files(resolve(folder), MODEL_STEM)])


def _write_archive(header: Header, base: WeightFiles, own: WeightFiles, target: Path) -> None:
    kept: dict[str, list[Any]] = {}
    with zipfile.ZipFile(target, "w") as archive, ThreadPoolExecutor(cores()) as pool:
        archive.writestr("header", base.raw(header.path.name, 0, header.data_start).numpy().tobytes())
        for number, name in enumerate(header.tensors):
            alike = _alike(name, base, own)
            starts = range(0, base.places[name].info.nbytes, _BLOCK)
            for first in range(0, len(starts), cores()):
                some = starts[first : first + cores()]
                packed = pool.map(lambda start, name=name, alike=alike: _packed(name, start, base, own, alike), some)
                for count, data in enumerate(packed, start=first):
                    if data is not None:
                        archive.writestr(f"{number}/{count}", data)
            kept[name] = [number, alike]
        archive.writestr("tensors.json", json.dumps(kept))


def _alike(name: str, base: WeightFiles, own: WeightFiles) -> bool:
    """Whether both folders have the tensor in the same number of bytes."""
    return name in own and own.places[name].info.nbytes == base.places[name].info.nbytes


def _packed(name: str, start: int, base: WeightFiles, own: WeightFiles, alike: bool) -> bytes | None:
    """What tells a block of the base's tensor from the output's, compressed; ``None`` where nothing does."""
    info = base.places[name].info
    count = min(_BLOCK, info.nbytes - start)
    block = base.bytes(name, start, count)
    if alike:
        block ^= own.bytes(name, start, count)
    if not bool(block.any()):
        return None
    size = max(1, DTYPE_BITS[info.dtype] // 8)
    return zlib.compress(block.view(-1, size).T.contiguous().numpy().tobytes(), 1)


def _unpacked(data: bytes, size: int) -> Tensor:
    try:
        block = torch.frombuffer(bytearray(zlib.decompress(data)), dtype=torch.uint8)
    except zlib.error as error:
        raise CorruptFileError(
            f"The delta of this merge is damaged: {error}.", hint="Give the base instead."
        ) from error
    return block.view(size, -1).T.contiguous().view(-1)


def _rebuild(merged: Path, folder: Path) -> None:
    own = _open(merged)
    try:
        for path in sorted((merged / DELTA).glob("*.zip")):
            with zipfile.ZipFile(path) as archive:
                if path.name == _SMALL:
                    archive.extractall(folder)
                else:
                    _rebuild_file(archive, own, folder / path.name.removesuffix(".zip"))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        if isinstance(error, VeneerError):
            raise
        raise CorruptFileError(
            f"{merged / DELTA} is damaged: {error}.", hint="Give the base instead: --base ..."
        ) from error
    finally:
        own.close()
    for name in read_manifest(merged)["base"]["sha256"]:
        if not (folder / name).exists() and (merged / name).is_file():
            shutil.copyfile(merged / name, folder / name)


def _rebuild_file(archive: zipfile.ZipFile, own: WeightFiles, target: Path) -> None:
    with target.open("wb") as out:
        out.write(archive.read("header"))
        out.flush()
        header = _header_of(target)
        members = set(archive.namelist())
        kept = json.loads(archive.read("tensors.json"))
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            number, alike = kept[name]
            size = max(1, DTYPE_BITS[info["dtype"]] // 8)
            start, end = info["data_offsets"]
            for count, position in enumerate(range(0, end - start, _BLOCK)):
                length = min(_BLOCK, end - start - position)
                member = f"{number}/{count}"
                block = own.bytes(name, position, length) if alike else torch.zeros(length, dtype=torch.uint8)
                if member in members:
                    block ^= _unpacked(archive.read(member), size)
                out.write(block.numpy().data)


def _header_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    values: dict[str, Any] = json.loads(raw[8:])
    values.pop("__metadata__", None)
    return values
