"""``veneer demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer questions and repeats.")] = False,
    workdir: Annotated[Path | None, typer.Option(help="Keep what it writes here.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write a picture of each section into this folder.")] = None,
) -> None:
    """Show everything on a real model and three adapters."""
    from veneer.demo.script import main

    main(workdir=workdir, quick=quick, record=record)
