"""Makes the folder that a merge writes beside its place under a hidden name, and puts it there when it is complete.

parent/.NAME.merging/lock           held while a process writes here
parent/.NAME.merging/journal.json   the facts that identify the output, and the weight files that are on the disk
parent/.NAME.merging/model/         the output; its config.json comes last, so that it is no model before
parent/.NAME.merging/old/           the folder that was at NAME, for the moment of the exchange
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import MergeError, OutputError
from veneer.files.atomic_write import atomic_write
from veneer.files.json_file import read_json
from veneer.merging.base.hashing import matches
from veneer.merging.output.target import check_target, hidden_folder
from veneer.merging.work.rounding import RoundingFigures


@dataclass
class StagingFolder:
    """The hidden folder in which an output is made.

    Attributes:
        target: the output's place.
        root: the hidden folder beside it.
        made_from: the facts that identify the output.
        overwrite: whether a model that is at the target is replaced.
        finished: weight file that is on the disk -> its digest and figures.
    """

    target: Path
    root: Path
    made_from: Mapping[str, Any]
    overwrite: bool = False
    finished: dict[str, tuple[str, list[RoundingFigures]]] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """The folder that becomes the output."""
        return self.root / "model"

    def record(self, name: str, digest: str, figures: list[RoundingFigures]) -> None:
        """Note that a weight file is on the disk."""
        self.finished[name] = digest, figures
        files = {n: {"digest": d, "figures": [vars(f) for f in fs]} for n, (d, fs) in self.finished.items()}
        with atomic_write(self.root / "journal.json") as temporary:
            temporary.write_text(json.dumps({"made_from": self.made_from, "finished": files}), encoding="utf-8")

    def commit(self) -> None:
        """Put the folder in the target's place; ``OutputError`` when something has come there meanwhile."""
        check_target(self.target, self.overwrite)
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
def staging_folder(
    target: Path, made_from: Mapping[str, Any], resume: bool, overwrite: bool
) -> Iterator[StagingFolder]:
    """Give a folder to make the output in. Nothing of it is left when the block fails, unless it is to be resumed.

    Raises:
        OutputError: another process writes there, or the target is taken, then or when the output is to take its
            place. MergeError: the unfinished merge there was made from other inputs.
    """
    root = hidden_folder(target)
    _check_is_ours(root)
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root, target):
        staging = StagingFolder(target, root, json.loads(json.dumps(made_from)), overwrite)
        _put_back(staging)
        check_target(target, overwrite)
        if resume:
            _resume(staging)
        else:
            _clear(root)
        staging.model.mkdir(exist_ok=True)
        try:
            yield staging
        except BaseException:
            _put_back(staging)
            if not resume:
                shutil.rmtree(root, ignore_errors=True)
            raise


@contextmanager
def _locked(root: Path, target: Path) -> Iterator[None]:
    """Hold the lock of a hidden folder, or raise ``OutputError`` where another process holds it."""
    # The lock is not opened through a link, and not emptied: others may be able to write beside the target.
    lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise OutputError(
            f"Another process is writing {target}.", hint="Wait for it, or choose another folder."
        ) from error
    try:
        yield
    finally:
        os.close(lock)


def _check_is_ours(root: Path) -> None:
    """Raise ``OutputError`` where a link leads out of the hidden folder."""
    odd = next((path for path in (root, *(root.iterdir() if root.is_dir() else ())) if path.is_symlink()), None)
    if odd is not None:
        raise OutputError(
            f"{odd} is a link, and a merge makes none; it is not followed.",
            hint=f"Look at {root}, which somebody has prepared, and remove it; or choose another folder.",
        )


def _put_back(staging: StagingFolder) -> None:
    """Undo an exchange that a kill has cut in two."""
    old = staging.root / "old"
    if old.exists() and not staging.target.exists():
        old.rename(staging.target)


def _clear(folder: Path, keep: Container[str] = ("lock",)) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()


def _resume(staging: StagingFolder) -> None:
    """Keep the finished weight files whose digest is still the one in the journal; remove everything else."""
    journal = staging.root / "journal.json"
    if not journal.is_file():
        _clear(staging.root)
        return
    begun, finished = _read_journal(journal)
    if begun != staging.made_from:
        differs = [key for key in staging.made_from if begun.get(key) != staging.made_from[key]]
        raise MergeError(
            f"The unfinished merge at {staging.root} was made from something else ({', '.join(differs)}).",
            hint="Merge without --resume to begin again.",
        )
    for name in staging.made_from.get("files", ()):
        path = staging.model / name
        if name in finished and not path.is_symlink() and matches(path, finished[name][0]):
            staging.finished[name] = finished[name]
    # A killed merge may have left a config or a manifest: this one writes its own, last.
    _clear(staging.model, keep=staging.finished)


def _read_journal(journal: Path) -> tuple[dict[str, Any], dict[str, tuple[str, list[RoundingFigures]]]]:
    """Read a journal: the facts that identify the output, and each finished file's digest and figures."""
    values = read_json(journal)
    try:
        files = {
            n: (str(e["digest"]), [RoundingFigures(**f) for f in e["figures"]]) for n, e in values["finished"].items()
        }
        return dict(values["made_from"]), files
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MergeError(
            f"{journal} is damaged, so nothing records the work that was done.",
            hint="Merge without --resume to begin again.",
        ) from error


def _sync(path: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
