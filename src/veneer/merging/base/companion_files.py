"""Copies a checkpoint's companion files into a merge: config, tokenizer, chat templates, licence.

Two kinds are left out: a link out of its folder, whose maker may not know the file that it leads to here, and an
adapter's code, which would run in the place of the code that the user of the base trusts.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from veneer.errors import SourceError
from veneer.files.adapter_folders import SET_FILE
from veneer.files.json_file import read_json
from veneer.files.names import ADAPTER_STEM, MODEL_CONFIG
from veneer.files.source import Source
from veneer.files.weight_files import weight_files
from veneer.formats.foreign import foreign

MANIFEST = "merge_manifest.json"
TEMPLATES = "additional_chat_templates"
# The merge writes these itself, or they are about something else than its output.
_NOT_COPIED = (".gitattributes", "README.md", "trainer_state.json", SET_FILE, MANIFEST)
_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".tflite",
    ".ot",
)
_CODE = (".py", ".pyc", ".pyd", ".so")
# Here transformers looks for the code of a tokenizer or a processor, under "auto_map".
_NAMES_CODE = (
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
# A blob of the hub's cache is named by its digest, which nobody can guess: only a download makes a link to one.
_BLOB = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


def companions_of(root: Path) -> dict[str, Path]:
    """List the files of a folder that belong to its model and are no weights: name -> path, the config among them.

    Raises:
        SourceError: one of them is no regular file, or a link that leads out of the folder.
    """
    names = sorted(path.name for path in root.iterdir() if not path.is_dir())
    files = {name: root / name for name in names if _belongs(name)}
    folder = root / TEMPLATES
    if folder.is_dir():
        files |= {f"{TEMPLATES}/{path.name}": path for path in sorted(folder.glob("*.jinja"))}
    check_inside(root, files.values())
    return files


def _belongs(name: str) -> bool:
    return not name.endswith(_WEIGHTS) and not name.startswith(("adapter_", ".")) and name not in _NOT_COPIED


def files_of_adapter(source: Source) -> dict[str, Path]:
    """List an adapter's config and weight files: name -> path.

    Raises:
        SourceError: as :func:`companions_of` raises it.
    """
    paths = _alone(source) or {path for path in source.root.glob("adapter_*") if path.is_file()}
    if foreign(source) is None:
        paths |= set(weight_files(source, ADAPTER_STEM))
    elif source.file is None:
        paths |= {source.path(name) for name in source.files() if name.endswith(_WEIGHTS)}
    check_inside(source.root, paths)
    return {path.relative_to(source.root).as_posix(): path for path in sorted(paths)}


def folders_of(sources: Iterable[Source]) -> list[Path]:
    """Return the folders of adapters; the folder around an adapter that is a file alone is not its own."""
    return [source.root for source in sources if not _alone(source)]


def _alone(source: Source) -> set[Path]:
    """Return the file of an adapter that is a file alone, whatever lies beside it."""
    return set() if source.file is None or foreign(source) is None else {source.file}


def check_inside(root: Path, paths: Iterable[Path]) -> None:
    """Raise ``SourceError`` for a path in ``root`` that is no regular file, or a link that leads out of it."""
    for path in paths:
        try:
            real, home = path.resolve(strict=True), root.resolve()
        except (OSError, RuntimeError) as error:  # a link to nothing, or to itself
            raise SourceError(
                f"{path} is a link that leads nowhere.", hint="Put the file itself there, or remove the link."
            ) from error
        if not real.is_file():
            raise SourceError(f"{path} is no regular file.", hint="Remove it, or put a file in its place.")
        if not (real.is_relative_to(home) or _is_blob(real, home)):
            raise SourceError(
                f"{path} is a link to {real}, out of its folder; it is not followed.",
                hint="If you trust it, put the file itself there (cp -L); else remove the link.",
            )


def _is_blob(real: Path, home: Path) -> bool:
    """Tell whether a file is a blob of the hub's cache, of ``home``'s own repository or named by its digest."""
    repository = next((place.parent for place in home.parents if place.name == "snapshots"), None)
    of_hub = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    of_repository = repository is not None and real.parent == repository / "blobs"
    return of_repository or (of_hub and _BLOB.fullmatch(real.name) is not None)


def copy_companions(base: Path, adapters: Iterable[Path], folder: Path) -> list[str]:
    """Copy companion files into ``folder``: the base's, then the adapters', which take their place.

    Args:
        base: the base's folder. Its config is left to the caller.
        adapters: the adapters' folders; a later one's files replace an earlier one's.
        folder: the target.

    Returns:
        Warnings for the user.
    """
    warnings: list[str] = []
    base_files = companions_of(base)
    for name, path in base_files.items():
        if name != MODEL_CONFIG:
            _copy(path, folder / name)
    for root in adapters:
        for name, path in companions_of(root).items():
            if name.lower().endswith(_CODE):
                if name in base_files and path.read_bytes() != base_files[name].read_bytes():
                    warnings.append(f"{path} is not the base's {name}; the base's stays.")
            elif name in _NAMES_CODE:
                _copy_without_code(path, base_files.get(name), folder / name)
            elif name != MODEL_CONFIG:
                _copy(path, folder / name)
    return warnings


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, target)


def _copy_without_code(path: Path, base: Path | None, target: Path) -> None:
    """Copy an adapter's file, but let it name the base's code instead of its own, if the base's file names any."""
    values = read_json(path)
    base_code = None if base is None else read_json(base).get("auto_map")
    if values.get("auto_map") == base_code or "auto_map" not in values:
        _copy(path, target)
        return
    del values["auto_map"]
    values |= {} if base_code is None else {"auto_map": base_code}
    target.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
