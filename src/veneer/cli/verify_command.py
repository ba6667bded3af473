"""``veneer verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.options import Base, BaseArgument, Json, Local, given_base
from veneer.cli.terminal import print_warnings, progress, show
from veneer.printing import quiet


def verify(
    out: Annotated[Path, typer.Argument(metavar="MERGED", help="The merged folder.")],
    base_argument: BaseArgument = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="The adapters, in their order; by default as the manifest says.")
    ] = None,
    base: Base = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Compute only so many pieces again; all if left out.")
    ] = None,
    logits: Annotated[bool, typer.Option(help="Load both models and compare what they answer.")] = True,
    prompt: Annotated[list[str] | None, typer.Option(help="Compare on this; some are built in.")] = None,
    max_kl: Annotated[float, typer.Option(min=0.0, help="Mean divergence in nats that passes.")] = 0.02,
    json: Json = False,
    local_files_only: Local = False,
) -> int:
    """Prove that a merged folder is what its manifest says. Exit code 0: it passes; 2: it does not.

    Example: veneer verify merged --adapter path/to/adapter --base path/to/base
    """
    base = given_base(base_argument, base)
    with quiet() as warnings, progress("loading") as on_step:
        from veneer.merging import verify as room

        report = room.verify(
            out,
            adapter,
            base,
            sample=sample,
            logits=logits,
            prompts=prompt,
            max_kl=max_kl,
            local_files_only=local_files_only,
            on_step=on_step,
        )
    print_warnings(warnings)
    show(report, json)
    return 0 if report.passed else 2
