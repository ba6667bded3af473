"""Finds the adapters and the base of a merge, reads their headers, and plans the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from veneer.adapters.merge.new_bias import new_biases
from veneer.checkpoints.find_base import find_base, kind_of
from veneer.checkpoints.open_checkpoint import open_checkpoint
from veneer.configs.patterns import matching
from veneer.errors import BaseMismatchError, MergeError
from veneer.files import adapter_folders
from veneer.files.base_config import is_of_diffusers
from veneer.files.base_digest import BASE_DIGEST_KEY, base_digest
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import INDEX, MODEL_CONFIG, MODEL_STEM
from veneer.files.resolve import resolve
from veneer.files.source import Source
from veneer.formats.base_facts import given_base
from veneer.merging.base.companion_files import check_inside, companions_of, files_of_adapter, folders_of
from veneer.merging.base.disk_base import DiskBase
from veneer.merging.base.hashing import Stamp, check_unchanged, stamps_of
from veneer.merging.base.weight_files import WeightFiles
from veneer.merging.work.adapter_changes import AdapterChanges, WeightedAdapter, bind_adapters
from veneer.merging.work.inputs import AdapterPaths, weighted
from veneer.merging.work.merge_options import MergeOptions
from veneer.merging.work.merge_plan import MergePlan, Planner
from veneer.merging.work.output_config import output_config
from veneer.merging.work.rounding import Rounding
from veneer.printing import warn


@dataclass
class PreparedMerge:
    """A merge that is ready to be written, or to be replayed.

    Attributes:
        adapters: the adapters, in order.
        sources: the adapters' folders.
        base: the base's folder.
        base_text: the base's origin, and how it was found.
        files: the base's weight files, open.
        changes: the adapters' changes.
        plan: the pieces of work and the output's files.
        config: keys of the base's config that the output has otherwise; ``...`` removes one.
        options: the merge's options.
        companions: the base's files that are no weights: name -> path.
        stamps: file that is read beside the base's weights -> its stamp at the start.
        warnings: for the user.
    """

    adapters: list[WeightedAdapter]
    sources: list[Source]
    base: Source
    base_text: str
    files: WeightFiles
    changes: AdapterChanges
    plan: MergePlan
    config: dict[str, Any]
    options: MergeOptions
    companions: dict[str, Path]
    stamps: dict[Path, Stamp]
    warnings: list[str] = field(default_factory=list)

    def check_unchanged(self) -> None:
        """Raise ``MergeError`` when the base or an adapter has changed since the start."""
        self.files.check_unchanged()
        check_unchanged(self.stamps)


def find_adapters(adapters: AdapterPaths, lookup: LookupOptions) -> tuple[list[Source], list[float]]:
    """Find the adapters' folders in their order, and their weights; a set stands for its active members."""
    pairs = weighted(adapters)
    if not pairs:
        raise MergeError("There is no adapter to merge.", hint="Give its path.")
    sources: list[Source] = []
    weights: list[float] = []
    for path, weight in pairs:
        source = resolve(path, lookup)
        members = adapter_folders.members(source)
        kind = kind_of(source, members)
        if kind == "model":
            raise MergeError(f"{path} is a full model; there is nothing to merge.", hint="Give an adapter's path.")
        names = adapter_folders.active(source, members) if members else []
        active = [next(m.source for m in members if m.name == name) for name in names] or [source]
        sources += active
        weights += [weight] * len(active)
    return sources, weights


@contextmanager
def prepare(
    adapters: AdapterPaths,
    base: str | Path | None,
    options: MergeOptions,
    lookup: LookupOptions,
    strict_base: bool = False,
) -> Iterator[PreparedMerge]:
    """Find and plan everything for the ``with`` block, in which the base's files are open; no weight is read before.

    Raises:
        SourceError, ConfigError: an adapter or the base cannot be read. BaseModelError: there is no usable base.
        BindError: adapters and base do not fit. MergeError: they cannot be merged.
    """
    sources, weights = find_adapters(adapters, lookup)
    facts = partial(given_base, base, lookup)
    checkpoints = [open_checkpoint(source, strict=options.strict, base=facts) for source in sources]
    weighted_adapters = [WeightedAdapter(*pair) for pair in zip(checkpoints, weights, strict=True)]
    found_base = find_base(sources[0], checkpoints, base, lookup)
    _check_kind(found_base.source)
    companions = _companions(found_base.source)
    stamps = stamps_of([*companions.values(), *_files_of_adapters(sources)])
    where = ", ".join(source.origin for source in sources)
    with WeightFiles.open(found_base.source) as files:
        warnings = _check_identity(weighted_adapters, found_base.source, strict_base)
        with matching(*(checkpoint.config for checkpoint in checkpoints), where=where):
            disk_base = DiskBase(
                found_base.source, files, checkpoints, options.task, options.dequantize, lookup.trust_remote_code
            )
            changes = bind_adapters(weighted_adapters, disk_base.model, disk_base.reader, options.strict)
            plan, config = _plan(disk_base, changes, options)
        warnings += [*disk_base.notes, *_missing(disk_base, plan), *changes.notes]
        yield PreparedMerge(
            adapters=weighted_adapters,
            sources=sources,
            base=found_base.source,
            base_text=f"{found_base.source.origin}, {found_base.why}",
            files=files,
            changes=changes,
            plan=plan,
            config=config,
            options=options,
            companions=companions,
            stamps=stamps,
            warnings=warnings,
        )


def _plan(base: DiskBase, changes: AdapterChanges, options: MergeOptions) -> tuple[MergePlan, dict[str, Any]]:
    """Plan a merge, and return the plan and the keys of the base's config that the output has otherwise."""
    biases = new_biases(changes.layers.values(), list(changes.weights), base.model, base.build)
    dtype = options.torch_dtype
    planner = Planner(base, changes, dtype, Rounding(options.rounding, options.seed), biases)
    plan = planner.plan(options.max_shard_size or base.file_size)
    return plan, output_config(base, plan, biases, dtype)


def _missing(base: DiskBase, plan: MergePlan) -> list[str]:
    """Return the warning about weights that nobody brings."""
    if not plan.missing:
        return []
    return [
        f"{len(plan.missing)} weights of {type(base.model).__name__} are not in the base and start random when the "
        f"output is loaded: {', '.join(plan.missing[:3])}."
    ]


def _check_kind(base: Source) -> None:
    """Refuse a base of diffusers, which is not known without its weights."""
    if is_of_diffusers(base.json(MODEL_CONFIG)):
        raise MergeError(
            f"{base.origin} is a model of diffusers, which is merged in memory.",
            hint=f'In Python: veneer.load(ADAPTER, base="{base.origin}", merge=True).save_pretrained(OUT)',
        )


def _companions(base: Source) -> dict[str, Path]:
    """Return the base's files that are no weights, its index among them."""
    index = f"{MODEL_STEM}{INDEX}"
    if base.has(index):
        check_inside(base.root, [base.path(index)])
    return {**companions_of(base.root), **({index: base.path(index)} if base.has(index) else {})}


def _files_of_adapters(sources: Sequence[Source]) -> list[Path]:
    """List the files of adapters, their companion files included."""
    companions = [path for root in folders_of(sources) for path in companions_of(root).values()]
    return [*companions, *(path for source in sources for path in files_of_adapter(source).values())]


def _check_identity(merged: Sequence[WeightedAdapter], base: Source, strict_base: bool) -> list[str]:
    """Compare the base with the one that each adapter records, and return the warnings."""
    warnings: list[str] = []
    for adapter in merged:
        recorded = adapter.checkpoint.metadata.get(BASE_DIGEST_KEY)
        if recorded is None or recorded == base_digest(base):
            continue
        message = f"The adapter {adapter.checkpoint.origin} was trained on another base than {base.origin}."
        if strict_base:
            raise BaseMismatchError(message, hint="Give the base that it was trained on.")
        warn(message + " The merged model may answer differently.")
        warnings.append(message)
    return warnings
