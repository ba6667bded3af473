"""``veneer check``."""

from __future__ import annotations

from typing import Any

import click

from veneer.cli import options
from veneer.cli.options import PATH_OR_ID
from veneer.cli.terminal import show


@click.command()
@click.argument("path", type=PATH_OR_ID, help="The adapter's folder or hub id.")
@click.option("--for", "server", default="vllm", help="The server: vllm.")
@options.as_json
@options.revision
@options.local_files_only
def check(path: str, server: str, json: bool, **lookup: Any) -> int:
    """Tell whether a server takes an adapter as it is, and what to do where not (exit code 1).

    Example: veneer check path/to/adapter --for vllm
    """
    from veneer.checkpoints.serving import check_serving

    report = check_serving(path, server, **lookup)
    show(report, json)
    return 0 if report.fits else 1
