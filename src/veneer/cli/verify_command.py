"""``veneer verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from veneer.cli import options
from veneer.cli.options import A_PATH, PATH_OR_ID, NumberRange, given_base
from veneer.cli.terminal import print_warnings, progress, show
from veneer.printing import quiet


@click.command()
@click.argument("out", metavar="MERGED", type=A_PATH, help="The merged folder.")
@options.base_argument
@click.option(
    "--adapter", type=PATH_OR_ID, multiple=True, help="The adapters, in their order; by default as the manifest says."
)
@options.base
@click.option("--sample", type=click.IntRange(min=1), help="Compute only so many pieces again; all if left out.")
@click.option("--logits/--no-logits", default=True, help="Load both models and compare what they answer.")
@click.option("--prompt", "prompts", metavar="PROMPT", multiple=True, help="Compare on this; some are built in.")
@click.option("--max-kl", type=NumberRange(min=0), default=0.02, help="Mean divergence in nats that passes.")
@options.as_json
@options.local_files_only
def verify(
    out: Path, base_argument: str | None, adapter: tuple[str, ...], base: str | None, json: bool, **proof: Any
) -> int:
    """Prove that a merged folder is what its manifest says. Exit code 0: it passes; 2: it does not.

    Example: veneer verify merged --adapter path/to/adapter --base path/to/base
    """
    base = given_base(base_argument, base)
    with quiet() as warnings, progress("loading") as on_step:
        from veneer.merging import verify as room

        report = room.verify(out, list(adapter) or None, base, **proof, on_step=on_step)
    print_warnings(warnings)
    show(report, json)
    return 0 if report.passed else 2
