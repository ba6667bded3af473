"""Merges adapters into their base and writes a plain model, from disk to disk: the base is never in memory.

Nothing here imports torch before the base's files are being hashed: its import takes as long as hashing some gigabytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from veneer.files.lookup_options import LookupOptions
from veneer.keywords import DTYPE, TOKEN, takes
from veneer.merging.base.hashing import Hashing
from veneer.merging.output.merge_report import MergeReport
from veneer.merging.work.inputs import AdapterPaths, likely_weights


@takes(renamed={**DTYPE, **TOKEN})
def merge(
    adapter: AdapterPaths,
    base: str | Path | None = None,
    *,
    out: str | Path,
    dtype: Any = "auto",
    max_shard_size: str | int | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    dequantize: bool = False,
    reversible: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    task: str | None = None,
    strict: bool = True,
    strict_base: bool = False,
    revision: str | None = None,
    base_revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
) -> MergeReport:
    """Merge adapters into their base and write the result as a plain model folder.

    The weights go from disk to disk in blocks, so that memory does not grow with the model: float32 arithmetic,
    rounded once. Unchanged tensors are copied byte for byte, those that only the base has included. The
    output appears only when it is complete, with a ``merge_manifest.json`` beside the weights. Tokenizer, chat
    template, licence and other small files come along, the adapter's own before the base's; no adapter file does.

    Args:
        adapter: an adapter's folder or hub id; or several, merged in their order; or a mapping from each to the
            weight that its change is multiplied by, defined for those that add to the weights.
        base: the base; by default the one that the (first) adapter's config names.
        out: the folder to write. It must not exist or be empty, unless ``overwrite``.
        dtype: of the merged weights; ``"auto"`` keeps the base's.
        max_shard_size: bytes in one weight file, as a number or such as ``"5GB"``; the base's division if ``None``.
        rounding: ``"nearest"``, or ``"stochastic"``: up or down so that the expected value is exact.
        seed: of the stochastic rounding.
        dequantize: turn a base in float8 or of bitsandbytes into plain numbers, of ``dtype`` or of the dtype of its
            other weights.
        reversible: keep, compressed beside the weights, what :func:`veneer.unmerge` needs to restore the base.
        overwrite: replace the model at ``out``.
        resume: go on where a merge of the same inputs to ``out`` was killed; one that fails can be resumed too.
        task: what the model is for; by default the adapter's task.
        strict: raise when adapter and base do not fit; else merge what fits and warn.
        strict_base: raise when the base is not the one that the adapter records; else warn.
        revision: of the adapter on the hub.
        base_revision: of the base on the hub.
        subfolder: where in ``adapter`` to look.
        token: for the hub.
        local_files_only: never use the network.
        trust_remote_code: run code that comes with the base model.
        on_step: called with the name of each step as it begins, for a progress display.

    Raises:
        OutputError: ``out`` is taken or cannot be written. MergeError: ``adapter`` is no adapter, the merged weights
            are not finite, a file changed meanwhile. SourceError, ConfigError, BaseModelError, BindError: as loading
            raises.
    """
    started = time.perf_counter()
    on_step("loading")
    lookup = LookupOptions(
        revision,
        subfolder,
        token,
        local_files_only,
        base_revision=base_revision,
        trust_remote_code=trust_remote_code,
    )
    with closing(Hashing(likely_weights(adapter, base, lookup))) as hashing:
        from veneer.merging.output.target import check_target, written_to
        from veneer.merging.output.write_folder import write_folder
        from veneer.merging.work.merge_options import merge_options
        from veneer.merging.work.prepare import prepare

        target = written_to(out)
        check_target(target, overwrite)
        options = merge_options(
            dtype,
            max_shard_size,
            rounding=rounding,
            seed=seed,
            dequantize=dequantize,
            task=task,
            strict=strict,
        )
        with prepare(adapter, base, options, lookup, strict_base) as prepared:
            return write_folder(prepared, target, hashing, reversible, resume, overwrite, on_step, started)
