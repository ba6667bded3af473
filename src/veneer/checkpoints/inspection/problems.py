"""Describes what will keep a checkpoint from loading, or from doing what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from veneer.checkpoints.inspection.facts import Problem
from veneer.errors import ConfigError, VeneerError
from veneer.files import adapter_folders
from veneer.files.base_map import look_up
from veneer.files.hub_page import is_hub_page
from veneer.files.names import ADAPTER_CONFIG, ADAPTER_STEM, ADAPTER_WEIGHTS, MODEL_CONFIG, SAFETENSORS
from veneer.files.paths import exists
from veneer.files.resolve import looks_like_hub_id
from veneer.files.source import PICKLES, Source


def problem_of(code: str, error: VeneerError) -> Problem:
    """Describe an error as a problem."""
    return Problem(code, error.message, error.hint or "")


def empty_checkpoint(source: Source, file: str = ADAPTER_WEIGHTS) -> Problem:
    """Describe weights without a value."""
    return Problem(
        "empty-checkpoint",
        f"{source.origin}: empty checkpoint: {file} holds no values.",
        "ZeRO-3 and FSDP save this when weights are not gathered first; gather them and save again.",
    )


def model_and_adapter(source: Source) -> Problem:
    """Describe a folder that holds a full model and an adapter."""
    return Problem(
        "model-and-adapter",
        f"{source.origin} holds a full model and an adapter; the adapter's config decides when it is loaded.",
        "If the adapter was merged into the model, move its adapter_* files away.",
    )


def no_adapter_config(path: str) -> Problem:
    """Describe an adapter's weights that lie alone."""
    return Problem(
        "no-config",
        f"{path}: an adapter's weights without {ADAPTER_CONFIG}: its scale and base are unknown.",
        "Copy the config from where the adapter was trained.",
    )


def no_checkpoint(source: Source) -> Problem:
    """Describe a folder with nothing that loads, by what it holds instead."""
    names = source.files()
    if not names and not any(source.root.iterdir()):
        return Problem("empty-folder", f"{source.origin} is an empty folder.", "Check the path.")
    if any(name in names for name in (ADAPTER_WEIGHTS, *PICKLES[ADAPTER_STEM])):
        return no_adapter_config(source.origin)
    weights = next((name for name in names if name.endswith(SAFETENSORS)), None)
    if weights is not None:
        return Problem(
            "no-config",
            f"{source.origin}: weights without {MODEL_CONFIG}: the model's class is unknown.",
            "Copy the config from where the model came from.",
        )
    inner = _inner_checkpoints(source)
    states = [name for name in inner if adapter_folders.TRAINER_CHECKPOINT.fullmatch(name)]
    if inner:
        what = "a trainer's checkpoints" if states else "checkpoints in its folders"
        return Problem(
            "trainer-output" if states else "in-subfolder",
            f"{source.origin} holds {what}: {', '.join(states or inner)}.",
            f"Choose one, such as {source.origin}/{(states or inner)[-1]}.",
        )
    return Problem(
        "no-checkpoint",
        f"{source.origin} holds neither {MODEL_CONFIG} nor {ADAPTER_CONFIG}.",
        "Check the path" + (f"; it holds {', '.join(names[:5])}." if names else "."),
    )


def _inner_checkpoints(source: Source) -> list[str]:
    """Return the folders below that hold a checkpoint, a trainer's in the order of their steps."""
    names = {p.parent.name for name in (MODEL_CONFIG, ADAPTER_CONFIG) for p in source.root.glob(f"[!.]*/{name}")}
    return sorted(names, key=_by_step)


def _by_step(name: str) -> list[tuple[int, str]]:
    """Order ``checkpoint-500`` before ``checkpoint-1000``."""
    return [(len(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def base_problems(base: Any, source: Source) -> list[Problem]:
    """Describe why the base that a config names is not found; whether a hub id exists is not known here."""
    hint = f"Name it when loading: --base BASE, in Python veneer.load({source.origin!r}, base=...)."
    if not isinstance(base, str) or not base:
        return [Problem("base-not-named", f"{source.origin}/{ADAPTER_CONFIG} names no base model.", hint)]
    try:
        place = look_up(base) or base
    except ConfigError as error:
        return [problem_of("base-map", error)]
    if looks_like_hub_id(place) or is_hub_page(place) or exists(Path(place)) or exists(source.root / place):
        return []
    moved = "" if place == base else f" (the base map says {place})"
    return [Problem("base-not-found", f"The base model {base}{moved} does not exist here.", hint)]
