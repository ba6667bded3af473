"""``veneer combine``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.options import Base, Json, Local, Revision, weighted
from veneer.cli.terminal import print_warnings, progress, show
from veneer.printing import quiet


def combine(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER", help="PATH or PATH=WEIGHT, several.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    type: Annotated[
        str, typer.Option(help="cat, linear, svd, ties, dare_linear, dare_ties or magnitude_prune.")
    ] = "svd",
    svd_rank: Annotated[int | None, typer.Option(help="Of the result; the largest of theirs if left out.")] = None,
    density: Annotated[
        float | None, typer.Option(help="The share of values that ties, dare_* and magnitude_prune keep.")
    ] = None,
    majority_sign_method: Annotated[
        str | None, typer.Option(help="total or frequency: how ties and dare_ties weigh signs.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of what dare_linear and dare_ties drop; 0 if left out.")] = None,
    base: Base = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is at OUT.")] = False,
    revision: Revision = None,
    json: Json = False,
    local_files_only: Local = False,
) -> None:
    """Combine adapters, each with its weight, into one plain LoRA adapter.

    Example: veneer combine adapters/pirate=0.7 adapters/json=0.3 --type ties --density 0.5 --out both
    """
    with quiet() as warnings, progress("loading") as on_step:
        from veneer.merging import combine_folders as room

        report = room.combine(
            weighted(None, adapters),
            base,
            out=out,
            combination_type=type,
            svd_rank=svd_rank,
            density=density,
            majority_sign_method=majority_sign_method,
            seed=seed,
            overwrite=overwrite,
            revision=revision,
            local_files_only=local_files_only,
            on_step=on_step,
        )
    print_warnings(warnings)
    show(report, json)
