"""``veneer unmerge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.options import BaseArgument, Json, Local, given_base
from veneer.cli.terminal import progress, show


def unmerge(
    merged: Annotated[Path, typer.Argument(help="The merged folder.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    base_argument: BaseArgument = None,
    base: Annotated[
        str | None, typer.Option(help="The base to copy; without it, the delta of a reversible merge is used.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is at OUT.")] = False,
    json: Json = False,
    local_files_only: Local = False,
) -> None:
    """Restore the base that a merged folder was made from, byte for byte.

    Example: veneer unmerge merged path/to/base --out restored
    """
    base = given_base(base_argument, base)
    with progress("restoring") as on_step:
        from veneer.merging.output import unmerge

        report = unmerge.unmerge(
            merged, out=out, base=base, overwrite=overwrite, local_files_only=local_files_only, on_step=on_step
        )
    show(report, json)
