"""``veneer demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer questions and repeats.")] = False,
    workspace: Annotated[
        Path | None, typer.Option(help="Work in this folder and keep it: the base, the adapters and what is merged.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(hidden=True, help="Write a picture of each section into this folder.")
    ] = None,
) -> None:
    """Show everything on a real model and three adapters.

    Example: veneer demo --workspace demo
    """
    from veneer.demo.script import main

    main(workspace=workspace, quick=quick, record=record)
