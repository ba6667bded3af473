"""``veneer inspect``."""

from __future__ import annotations

from typing import Any

import click

from veneer.cli import options
from veneer.cli.options import PATH_OR_ID
from veneer.cli.terminal import show


@click.command()
@click.argument("path", type=PATH_OR_ID, help="A folder, a .safetensors file or a hub id.")
@options.as_json
@options.revision
@click.option("--subfolder", help="Where below PATH to look.")
@options.local_files_only
def inspect(path: str, json: bool, **lookup: Any) -> int:
    """Tell what is at a path: model or adapter, method, base, rank, size, problems. Exit code 2: it is neither.

    Example: veneer inspect path/to/adapter
    """
    from veneer.checkpoints.inspection import inspect_path

    facts = inspect_path.inspect(path, **lookup)
    show(facts, json)
    return 2 if facts.kind == "unknown" else 0
