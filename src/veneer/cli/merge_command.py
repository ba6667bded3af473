"""``veneer merge``."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.options import Base, BaseArgument, Dtype, Json, Local, Revision, given_base, weighted
from veneer.cli.terminal import print_warnings, progress, show
from veneer.printing import quiet


def merge(
    path: Annotated[str | None, typer.Argument(metavar="ADAPTER", help="The adapter's folder or hub id.")] = None,
    base_argument: BaseArgument = None,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = ...,  # type: ignore[assignment]
    adapter: Annotated[
        list[str] | None, typer.Option(help="PATH or PATH=WEIGHT; several are merged in their order.")
    ] = None,
    base: Base = None,
    dtype: Dtype = "auto",
    max_shard_size: Annotated[
        str | None, typer.Option(help='Of one weight file, as "5GB"; as the base if left out.')
    ] = None,
    rounding: Annotated[str, typer.Option(help="nearest or stochastic.")] = "nearest",
    seed: Annotated[int, typer.Option(help="Of the stochastic rounding.")] = 0,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="Turn a quantised base into plain numbers.")] = False,
    reversible: Annotated[bool, typer.Option("--reversible", help="Keep what `veneer unmerge` needs.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Prove the result at once, as `veneer verify` does.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is at OUT.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a merge into OUT was cut off.")] = False,
    revision: Revision = None,
    json: Json = False,
    local_files_only: Local = False,
) -> int:
    """Merge adapters into their base: a plain model folder that needs neither.

    Example: veneer merge path/to/adapter path/to/base --out merged
    """
    base = given_base(base_argument, base)
    with quiet() as warnings, progress("loading") as on_step:
        from veneer.merging import merge_folder

        report = merge_folder.merge(
            adapters := weighted(path, adapter or []),
            base,
            out=out,
            dtype=dtype,
            max_shard_size=max_shard_size,
            rounding=rounding,
            seed=seed,
            dequantize=dequantize,
            reversible=reversible,
            overwrite=overwrite,
            resume=resume,
            revision=revision,
            local_files_only=local_files_only,
            on_step=on_step,
        )
        proof = None
        if verify:
            from veneer.merging import verify as room

            proof = room.verify(report.out, adapters, base, local_files_only=local_files_only, on_step=on_step)
    print_warnings([text for text in warnings if not any(known in text for known in report.warnings)])
    if json:
        print_warnings(report.warnings)
    if json and proof is not None:
        print(json_module.dumps({**report.to_dict(), "verify": proof.to_dict()}, indent=2))
    else:
        show(report, json)
        if proof is not None:
            show(proof, json)
    return 0 if proof is None or proof.passed else 2
