"""Combines adapters from their folders into one folder: a plain LoRA adapter, whatever their methods.

The kinds of combination, and their equations, are those of :mod:`veneer.adapters.merge.combining`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from veneer.adapters.merge.combining import ELECTING, ON_CHANGES, ON_FACTORS, RANDOM, Combination
from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.find_base import FoundBase, find_base
from veneer.checkpoints.model_class import wanted_task
from veneer.checkpoints.open_checkpoint import open_checkpoint
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import UsageError
from veneer.files.adapter_folders import DEFAULT, free_name
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import ADAPTER_WEIGHTS
from veneer.files.resolve import looks_like_hub_id
from veneer.files.source import Source
from veneer.formats.base_facts import given_base
from veneer.keywords import TOKEN, takes
from veneer.merging.output.target import check_adapter_target, check_apart
from veneer.merging.work.inputs import AdapterPaths
from veneer.merging.work.prepare import find_adapters
from veneer.peft_model.attach_adapter import AttachOptions, attach_adapter, combine_adapters
from veneer.peft_model.build_base import BuildOptions, build_base
from veneer.peft_model.peft_model import PeftModel, wrap
from veneer.printing import Report, nbytes, warn

# Option -> the kinds that take it; all take a rank.
_TAKEN_BY = {"density": ON_CHANGES, "majority_sign_method": ELECTING, "seed": RANDOM}


@dataclass(frozen=True)
class CombineReport(Report):
    """The result of a combination.

    Attributes:
        adapters: adapter -> its weight, in their order.
        base: the base model, and how it was found.
        out: the folder that was written.
        combination_type: how they were combined.
        options: what was chosen for that: name -> value.
        rank: of the new LoRA.
        layers: how many layers it adapts.
        nbytes: bytes of its weights.
        seconds: from start to end.
    """

    adapters: dict[str, float]
    base: str
    out: str
    combination_type: str
    options: dict[str, float | str]
    rank: int
    layers: int
    nbytes: int
    seconds: float

    _title = "combine report"

    def _facts(self) -> list[tuple[str, str]]:
        options = "".join(f", {name} {value}" for name, value in self.options.items())
        return [
            ("adapters", ", ".join(f"{weight:g} x {adapter}" for adapter, weight in self.adapters.items())),
            ("base", self.base),
            ("type", f"{self.combination_type}{options}"),
            ("out", f"{self.out}: LoRA of rank {self.rank} on {self.layers} layers, {nbytes(self.nbytes)}"),
            ("seconds", f"{self.seconds:.1f}"),
        ]


@takes(renamed=TOKEN)
def combine(
    adapters: AdapterPaths,
    base: str | Path | None = None,
    *,
    out: str | Path,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    strict: bool = True,
    strict_base: bool = False,
    revision: str | None = None,
    base_revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
) -> CombineReport:
    """Combine adapters into a plain LoRA adapter in float32 and write its folder, with a model card.

    Its tensors are those of :meth:`PeftModel.add_weighted_adapter`. The base is loaded for it.

    Args:
        adapters: a mapping from each adapter's folder or hub id to its weight; or a list, each of weight 1.
        base: the base; by default the one that the adapters' configs name.
        out: the folder to write. It must not exist or be empty, unless ``overwrite``.
        combination_type: ``"cat"``, ``"linear"``, ``"svd"``, ``"ties"``, ``"dare_linear"``, ``"dare_ties"`` or
            ``"magnitude_prune"``; see :meth:`PeftModel.add_weighted_adapter`.
        svd_rank: the rank of the result; by default the largest of the adapters' ranks on a layer, and for ``"cat"``
            and ``"linear"`` the one that holds the sum.
        density: the share of values that pruning and dropping leave, over 0 and up to 1; only they take it.
        majority_sign_method: ``"total"`` (the default) or ``"frequency"``; of the two kinds of TIES alone.
        seed: of what the two kinds of DARE drop; 0 where left out, so that a repetition gives the same tensors.
        overwrite: replace the adapter at ``out``.
        strict: raise when an adapter and the base do not fit; else use what fits and warn.
        strict_base: raise when the base is not the one that an adapter records; else warn.
        revision: of the adapters on the hub.
        base_revision: of the base on the hub.
        token: for the hub.
        local_files_only: never use the network.
        trust_remote_code: run code that comes with the base model.
        on_step: called with the name of each step as it begins, for a progress display.

    Raises:
        OutputError: ``out`` is taken or cannot be written. UsageError: an option is wrong, or of another type.
        MergeError: one is no adapter, or a prompt, or depends on the input. UnsupportedError: no LoRA can hold one of
            the changes. SourceError, ConfigError, BaseModelError, BindError: as loading raises.
    """
    started = time.perf_counter()
    on_step("loading")
    options = _options(combination_type, density=density, majority_sign_method=majority_sign_method, seed=seed)
    folder = Path(out)
    check_adapter_target(folder, overwrite)
    lookup = LookupOptions(
        revision,
        None,
        token,
        local_files_only,
        base_revision=base_revision,
        trust_remote_code=trust_remote_code,
    )
    sources, weights = find_adapters(adapters, lookup)
    _check_weights(sources, weights)
    names = _names(sources)
    combination = Combination(
        tuple(names),
        tuple(weights),
        combination_type,
        svd_rank,
        density,
        majority_sign_method or "total",
        options.get("seed"),
    )
    checkpoints = [open_checkpoint(source, strict=strict, base=partial(given_base, base, lookup)) for source in sources]
    found_base = find_base(sources[0], checkpoints, base, lookup)
    check_apart(
        folder, [*(("adapter", source.file or source.root) for source in sources), ("base", found_base.source.root)]
    )
    model = _load(found_base, dict(zip(names, checkpoints, strict=True)), trust_remote_code, strict, strict_base)
    on_step("combining")
    config = _replace_by_combination(model, combination)
    config.base_model_name_or_path = _base_name(found_base, checkpoints[0])
    on_step("writing")
    model.save_pretrained(folder)
    return CombineReport(
        adapters={source.origin: weight for source, weight in zip(sources, weights, strict=True)},
        base=f"{found_base.source.origin}, {found_base.why}",
        out=str(folder),
        combination_type=combination_type,
        options=options,
        rank=config.r,
        layers=len(list(model.adapters.get(DEFAULT).layers)),
        nbytes=(folder / ADAPTER_WEIGHTS).stat().st_size,
        seconds=time.perf_counter() - started,
    )


def _options(kind: str, **given: Any) -> dict[str, Any]:
    """Return the options that are given, with a seed where one is needed.

    Raises:
        UsageError: this kind of combination does not take one of them.
    """
    plain = kind.removesuffix("_svd")
    options = {name: value for name, value in given.items() if value is not None}
    for name in options if plain in (*ON_FACTORS, *ON_CHANGES) else ():
        if plain not in _TAKEN_BY[name]:
            takers = ", ".join(_TAKEN_BY[name])
            raise UsageError(f"{kind} takes no {name}.", hint=f"Leave it out, or take one of {takers}.")
    return {**({"seed": 0} if plain in RANDOM else {}), **options}


def _check_weights(sources: Sequence[Source], weights: Sequence[float]) -> None:
    """Raise ``UsageError`` for a weight that is not finite, or an adapter that is given twice."""
    for source, weight in zip(sources, weights, strict=True):
        if not math.isfinite(weight):
            raise UsageError(f"{source.origin}: {weight!r} is no weight.", hint="Give a finite number, such as 0.7.")
    origins = [source.origin for source in sources]
    twice = next((origin for origin in origins if origins.count(origin) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is given twice.", hint="Give each once, with one weight.")


def _names(sources: Sequence[Source]) -> list[str]:
    """Return a name on the model for each adapter, none of them the one that the combination gets."""
    names: list[str] = []
    for source in sources:
        names.append(free_name(source.origin, (*names, DEFAULT)))
    return names


def _load(
    base: FoundBase, checkpoints: dict[str, Checkpoint], trust_remote_code: bool, strict: bool, strict_base: bool
) -> PeftModel:
    """Build the base, with the adapters on it."""
    present = list(checkpoints.values())
    built, warnings = build_base(base.source, present, BuildOptions(None, "auto", None, trust_remote_code, {}))
    for warning in warnings:
        warn(warning)
    model = wrap(built, wanted_task(None, present))
    for name, checkpoint in checkpoints.items():
        attach_adapter(model, checkpoint, name, AttachOptions(strict=strict, strict_base=strict_base))
    return model


def _replace_by_combination(model: PeftModel, combination: Combination) -> LoraConfig:
    """Put a combination of a model's adapters in their place, and return its config."""
    combine_adapters(model, combination, DEFAULT)
    for name in combination.names:
        model.delete_adapter(name)
    config = model.peft_config[DEFAULT]
    assert isinstance(config, LoraConfig)
    return config


def _base_name(base: FoundBase, first: Checkpoint) -> str:
    """Return what the new config calls the base: its hub id where the first adapter has it, else where it lies."""
    name = first.config.base_model_name_or_path
    if name and looks_like_hub_id(name) and not Path(name).exists():
        return name
    return str(base.source.root.resolve()) if Path(base.source.origin).exists() else base.source.origin
