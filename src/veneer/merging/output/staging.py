"""The folder that a merge writes: made beside its place under a hidden name, and put there when it is complete.

parent/.NAME.merging/lock           held while a process writes here
parent/.NAME.merging/journal.json   what the output is made from, and the weight files that are on the disk
parent/.NAME.merging/model/         the output; its config.json comes last, so that it is no model before
parent/.NAME.merging/old/           what was at NAME, for the moment of the exchange
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

# In a reversible merge's output: what tells the base's bytes from the output's.
DELTA = "merge_delta"


@dataclass
class StagingFolder:
    """Where the output is made.

    Attributes:
        target: the output's place.
        root: the hidden folder beside it.
        made_from: tells this output from every other.
        overwrite: whether a model that is at the target is replaced.
        finished: weight file -> its SHA-256 and figures, for those that are on the disk.
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
def workshop(target: Path, made_from: Mapping[str, Any], resume: bool, overwrite: bool) -> Iterator[StagingFolder]:
    """A place to make the output in. Nothing of it is left when the block fails, unless it is to be resumed.

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
        shop = StagingFolder(target, root, json.loads(json.dumps(made_from)), overwrite)
        _put_back(shop)
        check_target(target, overwrite)
        if resume:
            _take_up(shop)
        else:
            _clear(root)
        shop.model.mkdir(exist_ok=True)
        try:
            yield shop
        except BaseException:
            _put_back(shop)
            if not resume:
                shutil.rmtree(root, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _place_of(target: Path) -> Path:
    """The hidden folder in which a target is made."""
    return target.parent / f".{target.name}.merging"


def _check_is_ours(root: Path) -> None:
    """Raise ``OutputError`` where a link leads out of the hidden folder."""
    odd = next((path for path in (root, *(root.iterdir() if root.is_dir() else ())) if path.is_symlink()), None)
    if odd is not None:
        raise OutputError(
            f"{odd} is a link, and a merge makes none; it is not followed.",
            hint=f"Look at {root}, which somebody has prepared, and remove it; or choose another folder.",
        )


def _put_back(shop: StagingFolder) -> None:
    """Undo an exchange that a kill has cut in two."""
    old = shop.root / "old"
    if old.exists() and not shop.target.exists():
        old.rename(shop.target)


def _clear(folder: Path, keep: Container[str] = ("lock",)) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()


def _take_up(shop: StagingFolder) -> None:
    """Keep the weight files that are finished, each read again and compared with what was noted; remove the rest."""
    journal = shop.root / "journal.json"
    if not journal.is_file():
        _clear(shop.root)
        return
    begun, finished = _noted(journal)
    if begun != shop.made_from:
        differs = [key for key in shop.made_from if begun.get(key) != shop.made_from[key]]
        raise MergeError(
            f"The unfinished merge at {shop.root} was made from something else ({', '.join(differs)}).",
            hint="Merge without --resume to begin again.",
        )
    for name in shop.made_from.get("files", ()):
        path = shop.model / name
        if name in finished and path.is_file() and not path.is_symlink() and sha256_of(path) == finished[name][0]:
            shop.finished[name] = finished[name]
    # A kill may have come after the config or the manifest: these are written anew, last, and speak of this run alone.
    _clear(shop.model, keep=shop.finished)


def _noted(journal: Path) -> tuple[dict[str, Any], dict[str, tuple[str, list[RoundingFigures]]]]:
    """What a journal says: what the output is made from, and each finished file's SHA-256 and figures."""
    noted = read_json(journal)
    try:
        files = {
            n: (str(e["sha256"]), [RoundingFigures(**f) for f in e["figures"]]) for n, e in noted["finished"].items()
        }
        return dict(noted["made_from"]), files
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MergeError(
            f"{journal} is damaged, so nothing says what was done.", hint="Merge without --resume to begin again."
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
    """The folder that ``out`` means, by a name of its own: where a link leads is written, and the link stays."""
    target = Path(out)
    with suppress(OSError):  # what keeps it from being written is told when that is tried
        return target.resolve() if target.is_symlink() or target.name == ".." else target
    return target


# What plain models are made of, by their files' names; a merge's output may hold more, which its manifest names.
_MODEL = (
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
    """What a folder holds that is no part of a plain model, by its path from there."""
    own = _recorded(target)
    found: list[str] = []
    for path in sorted(target.iterdir()):
        if path.name in _FOLDERS and path.is_dir() and not path.is_symlink():
            found += [f"{path.name}/{name}" for name in _unlike(path, _FOLDERS[path.name])]
    return found + [name for name in _unlike(target, _MODEL, own) if name not in _FOLDERS]


def _unlike(folder: Path, patterns: Collection[str], own: Collection[str] = ()) -> list[str]:
    """What lies in a folder and is neither one of its ``own`` files nor of any of these patterns, by name."""
    return [
        path.name
        for path in sorted(folder.iterdir())
        if path.is_dir() or not (path.name in own or any(fnmatchcase(path.name, pattern) for pattern in patterns))
    ]


def _recorded(target: Path) -> Collection[str]:
    """The files that a merge wrote there, as far as its manifest can be read."""
    try:
        return set(read_json(target / MANIFEST)["outputs"]["sha256"])
    except (VeneerError, KeyError, TypeError):
        return ()


def check_apart(target: Path, inputs: Iterable[tuple[str, Path]]) -> None:
    """Raise ``OutputError`` when something that is read lies at or below what is written, or where that is made.

    It is decided by the folders that the paths lead to, however they are spelt.

    Args:
        target: the folder to write.
        inputs: what each is, and its folder.
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
    """What two paths to one folder have in common; ``None`` where nothing is."""
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
