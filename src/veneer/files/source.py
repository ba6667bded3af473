"""Defines a source: a folder, its origin, and the files in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import CorruptFileError
from veneer.files.json_file import read_json
from veneer.files.names import ADAPTER_PICKLE, ADAPTER_STEM, DIFFUSERS_STEM, MODEL_STEM
from veneer.files.paths import is_file

# The same weights as pickles, by stem: what older tools wrote.
PICKLES: Mapping[str, tuple[str, ...]] = {
    ADAPTER_STEM: (ADAPTER_PICKLE, "adapter_model.pt", "adapter_model.pth"),
    DIFFUSERS_STEM: ("diffusion_pytorch_model.bin",),
    MODEL_STEM: ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth"),
}


@dataclass(frozen=True)
class Source:
    """A folder of files, local or from the hub.

    Attributes:
        root: the folder.
        origin: the path or hub id that the user gave.
        file: the file that the user gave, where that is no folder.
        revision: the hub revision that the user gave.
        commit: the hub commit of the files.
    """

    root: Path
    origin: str
    file: Path | None = None
    revision: str | None = None
    commit: str | None = None

    def path(self, name: str) -> Path:
        """Return the path of a file in the folder; raise ``CorruptFileError`` when ``name`` would leave it."""
        parts = Path(name).parts
        if Path(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name or not parts:
            raise CorruptFileError(
                f"{self.origin}: {name!r} points outside of its folder.", hint="Do not trust this checkpoint."
            )
        return self.root / name

    def has(self, name: str) -> bool:
        """Tell whether there is a file of that name."""
        return is_file(self.path(name))

    def json(self, name: str) -> dict[str, Any]:
        """Read a JSON object from a file of the folder."""
        return read_json(self.path(name))

    def files(self) -> list[str]:
        """List the names of the files in the folder, sorted; hidden ones and subfolders left out."""
        return sorted(p.name for p in self.root.iterdir() if p.is_file() and not p.name.startswith("."))
