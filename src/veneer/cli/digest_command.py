"""``veneer digest``."""

from __future__ import annotations

import click

from veneer.cli.options import PATH_OR_ID, switch


@click.command()
@click.argument("path", type=PATH_OR_ID, help="A full model's folder.")
@switch("--full", "Read every byte instead of samples.")
def digest(path: str, full: bool) -> None:
    """Print the digest that identifies a base model.

    Example: veneer digest path/to/base
    """
    from veneer.files.base_digest import base_digest

    print(base_digest(path, full=full))
