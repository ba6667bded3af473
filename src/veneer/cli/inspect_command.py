"""``veneer inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli.options import Json, Local, Revision
from veneer.cli.terminal import show


def inspect(
    path: Annotated[str, typer.Argument(help="A folder, a .safetensors file or a hub id.")],
    json: Json = False,
    revision: Revision = None,
    subfolder: Annotated[str | None, typer.Option(help="Where below PATH to look.")] = None,
    local_files_only: Local = False,
) -> int:
    """Tell what is at a path: model or adapter, method, base, rank, size, problems. Exit code 2: it is neither.

    Example: veneer inspect path/to/adapter
    """
    from veneer.checkpoints.inspection import inspect_path

    facts = inspect_path.inspect(path, revision=revision, subfolder=subfolder, local_files_only=local_files_only)
    show(facts, json)
    return 2 if facts.kind == "unknown" else 0
