"""The folder that a merge writes: made beside its place under a hidden name, and put there when it is complete.

parent/.NAME.merging/lock           held while a process writes here
parent/.NAME.merging/journal.json   what the output is made from, and the weight files that are on the disk
parent/.NAME.merging/model/         the output; its config.json comes last, so that it is no model before
parent/.NAME.merging/old/           what was at NAME, for the moment of the exchange
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import MergeError
from veneer.files import written_whole
from veneer.merging.hashing import sha256_of
from veneer.merging.rounding import Figures
from veneer.source import ADAPTER_CONFIG, MODEL_CONFIG, read_json

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Workshop:
    """Where the output is made.

    Attributes:
        target: the output's place.
        root: the hidden folder beside it.
        made_from: tells this output from every other.
        finished: weight file -> its SHA-256 and figures, for those that are on the disk.
    """

    target: Path
    root: Path
    made_from: Mapping[str, Any]
    finished: dict[str, tuple[str, list[Figures]]] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """The folder that becomes the output."""
        return self.root / "model"

    def record(self, name: str, digest: str, figures: list[Figures]) -> None:
        """Note that a weight file is on the disk."""
        self.finished[name] = digest, figures
        files = {n: {"sha256": d, "figures": [vars(f) for f in fs]} for n, (d, fs) in self.finished.items()}
        with written_whole(self.root / "journal.json") as temporary:
            temporary.write_text(json.dumps({"made_from": self.made_from, "finished": files}), encoding="utf-8")

    def commit(self) -> None:
        """Put the folder in the target's place."""
        for path in self.model.iterdir():
            _sync(path)
        _sync(self.model)
        old = self.root / "old"
        if self.target.exists():
            self.target.rename(old)
        self.model.rename(self.target)
        _sync(self.target.parent)
        shutil.rmtree(self.root)


@contextmanager
def workshop(target: Path, made_from: Mapping[str, Any], resume: bool) -> Iterator[Workshop]:
    """A place to make the output in. Nothing of it is left when the block fails, unless it is to be resumed.

    Raises:
        MergeError: another process writes there, or what was begun there was made from something else.
    """
    root = target.parent / f".{target.name}.merging"
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise MergeError(
                f"Another process is writing {target}.", hint="Wait for it, or choose another folder."
            ) from error
        shop = Workshop(target, root, json.loads(json.dumps(made_from)))
        _put_back(shop)
        if resume:
            _take_up(shop)
        else:
            _clear(root)
        shop.model.mkdir(exist_ok=True)
        try:
            yield shop
        except BaseException:
            if not resume:
                shutil.rmtree(root, ignore_errors=True)
            raise


def _put_back(shop: Workshop) -> None:
    """Undo an exchange that a kill has cut in two."""
    old = shop.root / "old"
    if old.exists() and not shop.target.exists():
        old.rename(shop.target)


def _clear(folder: Path, keep: Container[str] = ("lock",)) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()


def _take_up(shop: Workshop) -> None:
    """Keep the weight files that are finished, each read again and compared with what was noted; remove the rest."""
    journal = shop.root / "journal.json"
    if not journal.is_file():
        _clear(shop.root)
        return
    noted = read_json(journal)
    begun: Any = noted.get("made_from")
    if begun != shop.made_from:
        differs = [
            key for key in shop.made_from if not isinstance(begun, dict) or begun.get(key) != shop.made_from[key]
        ]
        raise MergeError(
            f"The unfinished merge at {shop.root} was made from something else ({', '.join(differs)}).",
            hint="Merge without --resume to begin again.",
        )
    for name, entry in noted["finished"].items():
        path = shop.model / name
        if path.is_file() and sha256_of(path) == entry["sha256"]:
            shop.finished[name] = entry["sha256"], [Figures(**figures) for figures in entry["figures"]]
    # A kill may have come after the config or the manifest: these are written anew, last, and speak of this run alone.
    _clear(shop.model, keep=shop.finished)


def check_target(target: Path, overwrite: bool) -> None:
    """Raise ``MergeError`` unless ``target`` can be written."""
    if target.is_file():
        raise MergeError(f"{target} is a file.", hint="Give a folder that does not exist yet.")
    if target.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise MergeError(
            f"{target} is the current folder, or one above it; the finished output would take its place.",
            hint="Give a folder that does not exist yet, such as merged.",
        )
    nearest = _nearest(target)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise MergeError(
            f"{target} cannot be written: {nearest} is no folder open to writing.", hint="Choose another place."
        )
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise MergeError(
                f"{target} is not empty.", hint="Choose another folder, or pass --overwrite (overwrite=True)."
            )
        if not (target / MODEL_CONFIG).is_file() or (target / ADAPTER_CONFIG).is_file():
            raise MergeError(
                f"{target} holds something other than a plain model; it is not replaced.",
                hint="Choose another folder, or empty this one yourself.",
            )


def check_space(target: Path, needed: int) -> None:
    """Raise ``MergeError`` when the disk has not ``needed`` bytes left."""
    free = shutil.disk_usage(_nearest(target)).free
    if free < needed:
        raise MergeError(
            f"{target} needs {needed / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} MB left.",
            hint="Make room, or choose another disk.",
        )


def _nearest(target: Path) -> Path:
    return next((place for place in (target, *target.parents) if place.exists()), Path())


@contextmanager
def told_as_merge_error(target: Path) -> Iterator[None]:
    """Turn the system's refusal to write into a ``MergeError``."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        mend = "Make room, or choose another disk." if error.errno in _FULL else "Check the disk and its permissions."
        raise MergeError(f"{target} cannot be written: {error.strerror or error}.", hint=mend) from error


def _sync(path: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
