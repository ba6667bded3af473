"""Tells how to go on after an inspection: the memory that loading needs, and the command that runs the model."""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path

from veneer.checkpoints.inspection.facts import AdapterFacts, PathFacts
from veneer.configs.names import TaskType
from veneer.errors import SourceError
from veneer.files.base_map import places_of
from veneer.files.hub import cached_snapshot
from veneer.files.names import MODEL_STEM
from veneer.files.paths import is_folder
from veneer.files.source import Source
from veneer.files.weight_files import weight_files

_TEXT_TASKS = (None, TaskType.CAUSAL_LM.value, TaskType.SEQ_2_SEQ_LM.value)
_TEXT_CLASSES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def weights_in_memory(facts: PathFacts, source: Source) -> int | None:
    """Return the bytes of the weights that are loaded, as they are on disk; ``None`` where the base is not here."""
    if facts.kind == "model":
        return facts.model.weights.nbytes if facts.model and facts.model.weights else None
    adapters = _adapters(facts)
    bases = {(adapter.base, adapter.base_revision) for adapter in adapters}
    base = _base_bytes(*bases.pop(), source) if len(bases) == 1 else None
    return None if base is None else base + sum(a.weights.nbytes for a in adapters if a.weights)


def generate_command(facts: PathFacts, path: str, revision: str | None) -> str | None:
    """Return the command that lets the model answer a prompt; ``None`` for one that writes no text."""
    if not _writes_text(facts):
        return None
    at = f" --revision {shlex.quote(revision)}" if revision else ""
    return f'veneer generate {shlex.quote(path)}{at} --prompt "Hello"'


def _writes_text(facts: PathFacts) -> bool:
    if facts.kind == "model":
        return facts.model is not None and (facts.model.architecture or "").endswith(_TEXT_CLASSES)
    return all(adapter.task in _TEXT_TASKS for adapter in _adapters(facts))


def _adapters(facts: PathFacts) -> list[AdapterFacts]:
    return [a for a in (facts.adapter, *(member.adapter for member in facts.adapters.values())) if a is not None]


def _base_bytes(name: str | None, revision: str | None, source: Source) -> int | None:
    if not name:
        return None
    *before, last = places_of(name, source.root)
    places = [Path(place) for place in (*before, last)]
    cached = cached_snapshot(last, revision)
    for folder in [*places, *([] if cached is None else [cached])]:
        if is_folder(folder):
            with suppress(SourceError, OSError):
                return sum(path.stat().st_size for path in weight_files(Source(folder, name), MODEL_STEM))
    return None
