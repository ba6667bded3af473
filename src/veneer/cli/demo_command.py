"""``veneer demo``."""

from __future__ import annotations

from typing import Any

import click

from veneer.cli.options import A_PATH, switch


@click.command()
@switch("--quick", "Fewer questions and repeats.")
@click.option(
    "--workspace", type=A_PATH, help="Work in this folder and keep it: the base, the adapters and what is merged."
)
@click.option("--record", type=A_PATH, hidden=True, help="Write a picture of each section into this folder.")
def demo(**options: Any) -> None:
    """Show everything on a real model and three adapters.

    Example: veneer demo --workspace demo
    """
    from veneer.demo.script import main

    main(**options)
