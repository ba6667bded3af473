"""``veneer check``."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli.options import Json, Local, Revision
from veneer.cli.terminal import show


def check(
    path: Annotated[str, typer.Argument(help="The adapter's folder or hub id.")],
    server: Annotated[str, typer.Option("--for", help="The server: vllm.")] = "vllm",
    json: Json = False,
    revision: Revision = None,
    local_files_only: Local = False,
) -> int:
    """Tell whether a server takes an adapter as it is, and what to do where not (exit code 1).

    Example: veneer check path/to/adapter --for vllm
    """
    from veneer.checkpoints.serving import check_serving

    report = check_serving(path, server, revision=revision, local_files_only=local_files_only)
    show(report, json)
    return 0 if report.fits else 1
