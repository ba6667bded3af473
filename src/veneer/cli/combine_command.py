"""``veneer combine``."""

from __future__ import annotations

from typing import Any

import click

from veneer.cli import options
from veneer.cli.options import A_PATH, PATH_OR_ID, weighted
from veneer.cli.terminal import print_warnings, progress, show
from veneer.printing import quiet


@click.command()
@click.argument(
    "adapters", metavar="ADAPTER...", type=PATH_OR_ID, nargs=-1, required=True, help="PATH or PATH=WEIGHT, several."
)
@click.option("--out", type=A_PATH, required=True, help="The folder to write.")
@click.option(
    "--type",
    "combination_type",
    metavar="TYPE",
    default="svd",
    help="cat, linear, svd, ties, dare_linear, dare_ties or magnitude_prune.",
)
@click.option("--svd-rank", type=int, help="Of the result; the largest of theirs if left out.")
@click.option("--density", type=float, help="The share of values that ties, dare_* and magnitude_prune keep.")
@click.option("--majority-sign-method", help="total or frequency: how ties and dare_ties weigh signs.")
@click.option("--seed", type=int, help="Of what dare_linear and dare_ties drop; 0 if left out.")
@options.base
@options.overwrite
@options.revision
@options.as_json
@options.local_files_only
def combine(adapters: tuple[str, ...], base: str | None, json: bool, **combination: Any) -> None:
    """Combine adapters, each with its weight, into one plain LoRA adapter.

    Example: veneer combine adapters/pirate=0.7 adapters/json=0.3 --type ties --density 0.5 --out both
    """
    with quiet() as warnings, progress("loading") as on_step:
        from veneer.merging import combine_folders as room

        report = room.combine(weighted(None, adapters), base, **combination, on_step=on_step)
    print_warnings(warnings)
    show(report, json)
