"""A source: a folder and where it came from, and the files in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import CorruptFileError
from veneer.files.json_file import read_json
from veneer.files.names import ADAPTER_STEM, MODEL_STEM
from veneer.files.paths import is_file

# The same weights as pickles, by stem: what older tools wrote.
PICKLES: Mapping[str, tuple[str, ...]] = {
    ADAPTER_STEM: ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth"),
    MODEL_STEM: ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth"),
}


@dataclass(frozen=True)
class Source:
    """A folder of files, wherever it came from.

    Attributes:
        root: the folder.
        origin: as it was asked for.
        file: the one file that was asked for, when it was not a folder.
        revision: the hub revision that was asked for.
        commit: the hub commit that it is.
    """

    root: Path
    origin: str
    file: Path | None = None
    revision: str | None = None
    commit: str | None = None

    def path(self, name: str) -> Path:
        """The path of a file in the folder; ``CorruptFileError`` when ``name`` would leave it."""
        parts = Path(name).parts
        if Path(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name or not parts:
            raise CorruptFileError(
                f"{self.origin}: {name!r} points outside of its folder.", hint="Do not trust this checkpoint."
            )
        return self.root / name

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return is_file(self.path(name))

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object read from a file of the folder."""
        return read_json(self.path(name))

    def files(self) -> list[str]:
        """The names of the files in the folder, sorted; hidden ones and subfolders left out."""
        return sorted(p.name for p in self.root.iterdir() if p.is_file() and not p.name.startswith("."))
