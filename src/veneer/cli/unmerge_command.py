"""``veneer unmerge``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from veneer.cli import options
from veneer.cli.options import A_PATH, PATH_OR_ID, given_base
from veneer.cli.terminal import progress, show


@click.command()
@click.argument("merged", type=A_PATH, help="The merged folder.")
@options.base_argument
@click.option("--out", type=A_PATH, required=True, help="The folder to write.")
@click.option("--base", type=PATH_OR_ID, help="The base to copy; without it, the delta of a reversible merge is used.")
@options.overwrite_model
@options.as_json
@options.local_files_only
def unmerge(merged: Path, base_argument: str | None, base: str | None, json: bool, **writing: Any) -> None:
    """Restore the base that a merged folder was made from, byte for byte.

    Example: veneer unmerge merged path/to/base --out restored
    """
    base = given_base(base_argument, base)
    with progress("restoring") as on_step:
        from veneer.merging.output import unmerge

        report = unmerge.unmerge(merged, base=base, **writing, on_step=on_step)
    show(report, json)
