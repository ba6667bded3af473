"""``veneer digest``."""

from __future__ import annotations

from pathlib import Path

import click

from veneer.cli.options import PATH_OR_ID, switch
from veneer.errors import UsageError


@click.command()
@click.argument("path", type=PATH_OR_ID, help="A full model's folder, or with --adapter an adapter's.")
@switch("--full", "Read every byte of a base instead of samples.")
@switch("--adapter", "The folder is an adapter's; print the digest that `veneer serve` gives it.")
def digest(path: str, full: bool, adapter: bool) -> None:
    """Print the digest that identifies a base model, or an adapter.

    Example: veneer digest path/to/base
    """
    if adapter:
        if full:
            raise UsageError("--full is for bases.", hint="Leave it out: of an adapter every byte is read anyway.")
        from veneer.serving.fetch import adapter_digest

        print(adapter_digest(Path(path)))
        return
    from veneer.files.base_digest import base_digest

    print(base_digest(path, full=full))
