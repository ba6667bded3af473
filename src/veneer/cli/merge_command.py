"""``veneer merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.options import Base, Dtype, Json, Local, Revision
from veneer.cli.terminal import progress, quiet, show, tell


def merge(
    adapter: Annotated[str, typer.Argument(help="The adapter's folder or hub id.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    base: Base = None,
    dtype: Dtype = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is at OUT.")] = False,
    revision: Revision = None,
    json: Json = False,
    local_files_only: Local = False,
) -> None:
    """Merge an adapter into its base: a plain model folder that needs neither."""
    with quiet() as warnings, progress("loading") as on_step:
        from veneer.merging import folder

        report = folder.merge(
            adapter,
            base,
            out=out,
            dtype=dtype,
            overwrite=overwrite,
            revision=revision,
            local_files_only=local_files_only,
            on_step=on_step,
        )
    tell(warnings)
    show(report, json)
