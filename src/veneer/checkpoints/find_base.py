"""Finds the base of an adapter: as given, as its config names it, or beside the adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from veneer.checkpoints.checkpoint import Checkpoint
from veneer.errors import BaseModelError, IncompleteCheckpointError, NotACheckpointError, PathNotFoundError, SourceError
from veneer.files import adapter_folders
from veneer.files.base_config import stem_of
from veneer.files.base_map import places_of
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG, PIPELINE_INDEX
from veneer.files.paths import exists, is_file
from veneer.files.resolve import resolve
from veneer.files.source import Source
from veneer.files.weight_files import read_headers
from veneer.formats.foreign import check_is_adapter_file, foreign


@dataclass(frozen=True)
class FoundBase:
    """Holds a base model's folder, and why it is this one."""

    source: Source
    why: str


def kind_of(source: Source, members: list[adapter_folders.Member]) -> str:
    """Return what is at a path: "model", "adapter", "model+adapter" or "set of adapters".

    Raises:
        IncompleteCheckpointError, NotACheckpointError: nothing that can be loaded.
    """
    if foreign(source) is not None:
        return "adapter"
    check_is_adapter_file(source)
    model, adapter = source.has(MODEL_CONFIG), source.has(ADAPTER_CONFIG)
    if members:
        return "set of adapters"
    if adapter:
        return "model+adapter" if model else "adapter"
    if model:
        return "model"
    if source.has(ADAPTER_WEIGHTS):
        raise IncompleteCheckpointError(
            f"{source.origin}: there is {ADAPTER_WEIGHTS} but no {ADAPTER_CONFIG}, so its scale is unknown.",
            hint="Copy the config from where the adapter was trained.",
        )
    states = [p.name for p in source.root.glob("checkpoint-*") if is_file(p / ADAPTER_CONFIG)]
    states.sort(key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    raise NotACheckpointError(
        f"{source.origin}: neither a model ({MODEL_CONFIG}) nor an adapter ({ADAPTER_CONFIG}) is there.",
        hint=f"It holds a trainer's checkpoints; load one, such as {source.origin}/{states[-1]}."
        if states
        else f"`veneer inspect {source.origin}` tells what is there.",
    )


# -- which base --------------------------------------------------------------------------------------------


def find_base(
    source: Source,
    checkpoints: list[Checkpoint],
    base: str | Path | None,
    lookup: LookupOptions,
    gguf_file: str | None = None,
) -> FoundBase:
    """Find the base of what is at ``source``: itself, the one asked for, or the one that its adapters name.

    Args:
        source: a full model or adapters.
        checkpoints: the adapters there; empty for a full model.
        base: the one asked for.
        lookup: how hub ids are looked up.
        gguf_file: the file in the folder of ``base`` that holds it; the folder needs no config then.

    Raises:
        BaseModelError: there is none.
    """
    if not checkpoints:
        if base is not None:
            raise BaseModelError(
                f"{source.origin} is a full model; it takes no base.",
                hint="Leave base= out, or give an adapter's path.",
            )
        return _checked(FoundBase(source, "the model itself"))
    lookup = lookup.for_base(checkpoints[0].config.revision)
    if base is not None:
        folder = _resolve_base(base, lookup)
        return _checked(FoundBase(folder, "as given by base=")) if gguf_file is None else _in_gguf(folder, gguf_file)
    return _named_base(source, checkpoints, lookup)


def _in_gguf(source: Source, file: str) -> FoundBase:
    if not source.has(file):
        present = ", ".join(sorted(path.name for path in source.root.glob("*.gguf"))) or "none"
        raise BaseModelError(f"{source.origin}: there is no {file}.", hint=f"GGUF files there: {present}.")
    return FoundBase(source, f"its {file}, dequantised")


def _resolve_base(base: str | Path, lookup: LookupOptions) -> Source:
    try:
        return resolve(base, lookup, what="base")
    except PathNotFoundError as error:
        raise BaseModelError(f"base={str(base)!r}: {error.message}", hint=error.hint) from error


def _named_base(source: Source, checkpoints: list[Checkpoint], lookup: LookupOptions) -> FoundBase:
    """Find the base that the adapters' configs name."""
    names = list(dict.fromkeys(c.config.base_model_name_or_path for c in checkpoints))
    hint = (
        f"Name it: --base BASE, in Python veneer.load({source.origin!r}, base=...), or for all adapters in "
        "VENEER_BASE_MAP."
    )
    if len(names) > 1:
        raise BaseModelError(f"{source.origin}: its adapters name different bases: {names}.", hint=hint)
    if not names[0]:
        place = source.origin if source.file is not None else f"{source.origin}/{ADAPTER_CONFIG}"
        raise BaseModelError(f"{place} names no base model.", hint=hint)
    name = names[0]
    tried = []
    places = places_of(name, source.root)
    for place, why in sorted(places.items(), key=lambda item: not exists(Path(item[0]))):
        try:
            folder = resolve(place, lookup, what="base")
        except SourceError as error:
            tried.append(f"{place} ({error.message.removeprefix(f'The base {place!r} ').rstrip('.')})")
            continue
        return _checked(FoundBase(folder, why))
    if source.has(MODEL_CONFIG):
        why = f"the model beside the adapter; {name}, which its config names, was not found"
        return _checked(FoundBase(source, why))
    raise BaseModelError(f"The base of {source.origin}, {name}, was not found. Tried: {'; '.join(tried)}.", hint=hint)


def _checked(base: FoundBase) -> FoundBase:
    """Read the base's headers, so that a broken one is known before anything large is loaded."""
    source = base.source
    gguf = sorted(path.name for path in source.root.glob("*.gguf"))
    if gguf and not any(source.root.glob("*.safetensors")):
        raise BaseModelError(
            f"{source.origin} holds its weights as GGUF ({gguf[0]}), which is read into memory only.",
            hint=f'Load it by name: veneer.load(ADAPTER, base="{source.origin}", gguf_file="{gguf[0]}"); with '
            "merge=True, its save_pretrained(OUT) writes the merged model.",
        )
    if not source.has(MODEL_CONFIG):
        if source.has(PIPELINE_INDEX):
            models = [name for name in source.json(PIPELINE_INDEX) if is_file(source.root / name / MODEL_CONFIG)]
            raise BaseModelError(
                f"{source.origin} is a pipeline of several models.",
                hint=f"Give the folder in it that the adapter is for: {', '.join(models)}.",
            )
        if source.has(ADAPTER_CONFIG):
            recorded = source.json(ADAPTER_CONFIG).get("base_model_name_or_path")
            raise BaseModelError(
                f"{source.origin} is an adapter, not a base model.",
                hint=f"Give the base that it was trained on ({recorded})."
                if recorded
                else "Give a full model's folder.",
            )
        raise BaseModelError(
            f"{source.origin} is no full model: there is no {MODEL_CONFIG}.",
            hint=f"`veneer inspect {source.origin}` tells what is there.",
        )
    read_headers(source, stem_of(source.json(MODEL_CONFIG)))
    return base
