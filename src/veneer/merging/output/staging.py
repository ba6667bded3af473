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
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from veneer.errors import MergeError, OutputError, VeneerError
from veneer.files.atomic_write import atomic_write
from veneer.files.json_file import read_json
from veneer.files.names import ADAPTER_CONFIG, MODEL_CONFIG
from veneer.files.output_folder import check_output
from veneer.files.paths import nearest_existing
from veneer.merging.base.companion_files import MANIFEST, TEMPLATES
from veneer.merging.base.hashing import sha256_of
from veneer.merging.work.rounding import RoundingFigures
from veneer.printing import nbytes

# In a reversible merge's output: the difference of the base's bytes from the output's.
DELTA = "merge_delta"


@dataclass
class StagingFolder:
    """The hidden folder in which an output is made.

    Attributes:
        target: the output's place.
        root: the hidden folder beside it.
        made_from: the facts that identify the output.
        overwrite: whether a model that is at the target is replaced.
        finished: weight file that is on the disk -> its SHA-256 and figures.
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
        files = {n: {"sha256": d, "figures": [vars(f) for f in fs]} for n, (d, fs) in self.finished.items()}
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
            place. MergeError: what was begun there was made from something else.
    """
    root = _place_of(target)
    _check_is_ours(root)
    root.mkdir(parents=True, exist_ok=True)
    # Neither through a link nor emptied: whoever may write beside the target can have put anything there.
    lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"Another process is writing {target}.", hint="Wait for it, or choose another folder."
            ) from error
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
    finally:
        os.close(lock)


def _place_of(target: Path) -> Path:
    """Return the path of the hidden folder in which a target is made."""
    return target.parent / f".{target.name}.merging"


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
    """Keep the finished weight files whose SHA-256 is still the one in the journal; remove everything else."""
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
        if name in finished and path.is_file() and not path.is_symlink() and sha256_of(path) == finished[name][0]:
            staging.finished[name] = finished[name]
    # A killed merge may have left a config or a manifest: this one writes its own, last.
    _clear(staging.model, keep=staging.finished)


def _read_journal(journal: Path) -> tuple[dict[str, Any], dict[str, tuple[str, list[RoundingFigures]]]]:
    """Read a journal: the facts that identify the output, and each finished file's SHA-256 and figures."""
    values = read_json(journal)
    try:
        files = {
            n: (str(e["sha256"]), [RoundingFigures(**f) for f in e["figures"]]) for n, e in values["finished"].items()
        }
        return dict(values["made_from"]), files
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MergeError(
            f"{journal} is damaged, so nothing records the work that was done.",
            hint="Merge without --resume to begin again.",
        ) from error


def check_target(target: Path, overwrite: bool) -> None:
    """Raise ``OutputError`` unless ``target`` can be written: it holds nothing, or a plain model to be replaced."""
    if target.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise OutputError(
            f"{target} is the current folder, or one above it; the finished output would take its place.",
            hint="Give a folder that does not exist yet, such as merged.",
        )
    check_output(target, overwrite)
    if target.is_dir() and any(target.iterdir()):
        _check_is_model(target)


def _check_is_model(target: Path) -> None:
    """Raise ``OutputError`` where a folder to be replaced holds something else than a plain model."""
    if not (target / MODEL_CONFIG).is_file() or (target / ADAPTER_CONFIG).is_file():
        raise OutputError(
            f"{target} holds something other than a plain model; it is not replaced.",
            hint="Choose another folder, or empty this one yourself.",
        )
    foreign = _foreign(target)
    if foreign:
        raise OutputError(
            f"{target} holds what is no part of a plain model, and would be lost: {', '.join(foreign[:3])}"
            f"{f' and {len(foreign) - 3} more' if len(foreign) > 3 else ''}.",
            hint="Move it away, or choose another folder.",
        )


def written_to(out: str | Path) -> Path:
    """Return the folder that ``out`` means, links and ``..`` resolved: a link stays, and its folder is written."""
    target = Path(out)
    with suppress(OSError):  # the check of the target raises the error
        return target.resolve() if target.is_symlink() or target.name == ".." else target
    return target


# The names of a plain model's files; a merge's output may hold others, which its manifest names.
_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    MODEL_CONFIG,
    "generation_config.json",
    "*token*.json",
    "*vocab*.json",
    "*vocab*.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*chat_template*",
    "*processor_config.json",
    "modeling_*.py",
    "configuration_*.py",
    "tokenization_*.py",
    "*process*.py",
    "tekken.json",
    "normalizer.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY.md",
    "README.md",
    ".gitattributes",
    MANIFEST,
)
_FOLDERS = {TEMPLATES: ("*.jinja",), DELTA: ("*.zip",)}


def _foreign(target: Path) -> list[str]:
    """List what a folder holds that is no part of a plain model, by its path from there."""
    recorded = _recorded(target)
    in_folders: list[str] = []
    for path in sorted(target.iterdir()):
        if path.name in _FOLDERS and path.is_dir() and not path.is_symlink():
            in_folders += [f"{path.name}/{name}" for name in _unlike(path, _FOLDERS[path.name])]
    return in_folders + [name for name in _unlike(target, _MODEL_FILES, recorded) if name not in _FOLDERS]


def _unlike(folder: Path, patterns: Collection[str], recorded: Collection[str] = ()) -> list[str]:
    """List what a folder holds that is neither recorded nor of any of these patterns, by name."""
    return [
        path.name
        for path in sorted(folder.iterdir())
        if path.is_dir() or not (path.name in recorded or any(fnmatchcase(path.name, pattern) for pattern in patterns))
    ]


def _recorded(target: Path) -> Collection[str]:
    """Return the files that a merge wrote there, as far as its manifest can be read."""
    try:
        return set(read_json(target / MANIFEST)["outputs"]["sha256"])
    except (VeneerError, KeyError, TypeError):
        return ()


def check_apart(target: Path, inputs: Iterable[tuple[str, Path]]) -> None:
    """Raise ``OutputError`` when an input lies at or below the folder to write, or the one in which that is made.

    Folders are compared by identity, however their paths are spelt.

    Args:
        target: the folder to write.
        inputs: the role of each, for errors, and its folder.
    """
    for what, path in inputs:
        real = path.resolve()
        above = {_identity(place) for place in (real, *real.parents)}
        taken = next((place for place in (target, _place_of(target)) if _identity(place) in above - {None}), None)
        if taken is not None:
            is_it = _identity(taken) == _identity(real)
            raise OutputError(
                f"{taken} {f'is the {what} itself' if is_it else f'holds the {what}, {path}'}; it is not replaced.",
                hint="Choose another folder.",
            )


def _identity(place: Path) -> tuple[int, int] | None:
    """Return what identifies a folder, whatever path leads to it; ``None`` where there is none."""
    try:
        stat = place.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def check_space(target: Path, needed: int) -> None:
    """Raise ``OutputError`` when the disk has not ``needed`` bytes left."""
    free = shutil.disk_usage(nearest_existing(target)).free
    if free < needed:
        raise OutputError(
            f"{target} needs {nbytes(needed)}, and the disk has {nbytes(free)} left.",
            hint="Make room, or choose another disk.",
        )


def _sync(path: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
