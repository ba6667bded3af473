"""``veneer digest``."""

from __future__ import annotations

from typing import Annotated

import typer


def digest(
    path: Annotated[str, typer.Argument(help="A full model's folder.")],
    full: Annotated[bool, typer.Option("--full", help="Read every byte instead of samples.")] = False,
) -> None:
    """Print the digest that identifies a base model.

    Example: veneer digest path/to/base
    """
    from veneer.files.base_digest import base_digest

    print(base_digest(path, full=full))
