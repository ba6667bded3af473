"""The inputs of a merge, and the files that it will probably read. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from veneer.files.base_map import places_of
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import ADAPTER_CONFIG, MODEL_STEM
from veneer.files.resolve import resolve
from veneer.files.weight_files import weight_files

# One adapter, several in their order, or several with weights.
AdapterPaths = str | Path | Sequence[str | Path] | Mapping[str | Path, float]


def weighted(adapters: AdapterPaths) -> list[tuple[str | Path, float]]:
    """Return the adapters in their order, with their weights."""
    if isinstance(adapters, (str, Path)):
        return [(adapters, 1.0)]
    if isinstance(adapters, Mapping):
        return [(path, float(weight)) for path, weight in adapters.items()]
    return [(path, 1.0) for path in adapters]


def likely_weights(adapters: AdapterPaths, base: str | Path | None, lookup: LookupOptions) -> list[Path]:
    """Return the base's weight files if they are found quickly: on this machine, of an adapter that names its base.

    Best effort: returns nothing on any problem, which :func:`.prepare.prepare` reports.
    """
    lookup = replace(lookup, local_files_only=True)
    places, recorded = [] if base is None else [base], None
    if base is None:
        with suppress(Exception):
            places, recorded = _named(adapters, lookup)
    for place in places:
        with suppress(Exception):
            return weight_files(resolve(place, lookup.for_base(recorded)), MODEL_STEM)
    return []


def _named(adapters: AdapterPaths, lookup: LookupOptions) -> tuple[list[str | Path], str | None]:
    """Return where the base may be that the first adapter's config names, and the revision that it records."""
    source = resolve(weighted(adapters)[0][0], lookup)
    config = source.json(ADAPTER_CONFIG)
    name = str(config["base_model_name_or_path"])
    return list(places_of(name, source.root)), config.get("revision")
