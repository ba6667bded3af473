"""Checks the folder to which a merge writes: its contents, its place, and the space that is left."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from veneer.errors import OutputError, VeneerError
from veneer.files.json_file import read_json
from veneer.files.names import ADAPTER_CONFIG, MODEL_CONFIG
from veneer.files.output_folder import check_output
from veneer.files.paths import is_file, is_folder, nearest_existing
from veneer.merging.base.companion_files import MANIFEST, TEMPLATES
from veneer.printing import nbytes

# In a reversible merge's output: the difference of the base's bytes from the output's.
DELTA = "merge_delta"
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


def hidden_folder(target: Path) -> Path:
    """Return the path of the hidden folder in which a target is made."""
    return target.parent / f".{target.name}.merging"


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


def check_adapter_target(folder: Path, overwrite: bool) -> None:
    """Raise ``OutputError`` unless an adapter can be written: the folder holds nothing, or one to be replaced."""
    check_output(folder, overwrite)
    if is_folder(folder) and any(folder.iterdir()) and not is_file(folder / ADAPTER_CONFIG):
        raise OutputError(f"{folder} holds no adapter; it is not replaced.", hint="Choose another folder.")


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
            f"{target} holds files or folders that are no part of a plain model and would be lost: "
            f"{', '.join(foreign[:3])}{f' and {len(foreign) - 3} more' if len(foreign) > 3 else ''}.",
            hint="Move it away, or choose another folder.",
        )


def written_to(out: str | Path) -> Path:
    """Return the folder that ``out`` means, links and ``..`` resolved: a link stays, and its folder is written."""
    target = Path(out)
    with suppress(OSError):  # the check of the target raises the error
        return target.resolve() if target.is_symlink() or target.name == ".." else target
    return target


def _foreign(target: Path) -> list[str]:
    """List the files and folders that are no part of a plain model, by their paths from the target."""
    recorded = _recorded(target)
    in_folders: list[str] = []
    for path in sorted(target.iterdir()):
        if path.name in _FOLDERS and path.is_dir() and not path.is_symlink():
            in_folders += [f"{path.name}/{name}" for name in _unlike(path, _FOLDERS[path.name])]
    return in_folders + [name for name in _unlike(target, _MODEL_FILES, recorded) if name not in _FOLDERS]


def _unlike(folder: Path, patterns: Collection[str], recorded: Collection[str] = ()) -> list[str]:
    """List the files and folders that are neither recorded nor of any of these patterns, by name."""
    return [
        path.name
        for path in sorted(folder.iterdir())
        if path.is_dir() or not (path.name in recorded or any(fnmatchcase(path.name, pattern) for pattern in patterns))
    ]


def _recorded(target: Path) -> Collection[str]:
    """Return the files that a merge wrote there, as far as its manifest can be read."""
    try:
        outputs = read_json(target / MANIFEST)["outputs"]
        return set(outputs.get("digests") or outputs["sha256"])  # the latter in the manifests of older versions
    except (VeneerError, AttributeError, KeyError, TypeError):
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
        taken = next((place for place in (target, hidden_folder(target)) if _identity(place) in above - {None}), None)
        if taken is not None:
            is_it = _identity(taken) == _identity(real)
            raise OutputError(
                f"{taken} {f'is the {what} itself' if is_it else f'holds the {what}, {path}'}; it is not replaced.",
                hint="Choose another folder.",
            )


def _identity(place: Path) -> tuple[int, int] | None:
    """Return the device and inode of a folder; ``None`` where there is none."""
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
