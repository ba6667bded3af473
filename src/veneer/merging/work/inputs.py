"""What a merge is given, and which files it will probably read. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.files.base_map import look_up
from veneer.files.names import ADAPTER_CONFIG, MODEL_STEM
from veneer.files.resolve import resolve
from veneer.files.weight_files import weight_files

# One adapter, several in their order, or several with weights.
AdapterPaths = str | Path | Sequence[str | Path] | Mapping[str | Path, float]


@dataclass(frozen=True)
class LookupOptions:
    """How paths are resolved: revisions, token, and whether the network may be used."""

    revision: str | None = None
    base_revision: str | None = None
    subfolder: str | None = None
    token: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False

    @property
    def hub(self) -> dict[str, Any]:
        """What every look-up is given."""
        return {"token": self.token, "local_files_only": self.local_files_only}


def weighted(adapters: AdapterPaths) -> list[tuple[str | Path, float]]:
    """The adapters in their order, with their weights."""
    if isinstance(adapters, (str, Path)):
        return [(adapters, 1.0)]
    if isinstance(adapters, Mapping):
        return [(path, float(weight)) for path, weight in adapters.items()]
    return [(path, 1.0) for path in adapters]


def likely_weights(adapters: AdapterPaths, base: str | Path | None, where: LookupOptions) -> list[Path]:
    """The base's weight files as far as they are found quickly: on this machine, of an adapter that names its base.

    A guess: whatever is wrong is said by what reads them for good.
    """
    places, revision = [] if base is None else [base], where.base_revision
    if base is None:
        with suppress(Exception):
            places, revision = _named(adapters, where)
    for place in places:
        with suppress(Exception):
            return weight_files(resolve(place, revision=revision, local_files_only=True), MODEL_STEM)
    return []


def _named(adapters: AdapterPaths, where: LookupOptions) -> tuple[list[str | Path], str | None]:
    """Where the base may be that the first adapter's config names, and at which revision."""
    first = weighted(adapters)[0][0]
    source = resolve(first, revision=where.revision, subfolder=where.subfolder, local_files_only=True)
    config = source.json(ADAPTER_CONFIG)
    name = str(config["base_model_name_or_path"])
    moved = look_up(name)
    places: list[str | Path] = [source.root / name, name] if moved is None else [moved]
    return places, where.base_revision or config.get("revision")
