"""``veneer merge``."""

from __future__ import annotations

import json as json_module
from typing import Any

import click

from veneer.cli import options
from veneer.cli.options import A_PATH, PATH_OR_ID, given_base, switch, weighted
from veneer.cli.terminal import print_warnings, progress, show
from veneer.printing import quiet


@click.command()
@click.argument("path", metavar="[ADAPTER]", type=PATH_OR_ID, required=False, help="The adapter's folder or hub id.")
@options.base_argument
@click.option("--out", type=A_PATH, required=True, help="The folder to write.")
@click.option(
    "--adapter", type=PATH_OR_ID, multiple=True, help="PATH or PATH=WEIGHT; several are merged in their order."
)
@options.base
@options.dtype
@click.option("--max-shard-size", help='Of one weight file, as "5GB"; as the base if left out.')
@click.option("--rounding", default="nearest", help="nearest or stochastic.")
@click.option("--seed", default=0, help="Of the stochastic rounding.")
@switch("--dequantize", "Turn a quantised base into plain numbers.")
@switch("--reversible", "Keep what `veneer unmerge` needs.")
@switch("--verify", "Prove the result at once, as `veneer verify` does.")
@options.overwrite_model
@switch("--resume", "Go on where a merge into OUT was cut off.")
@options.revision
@options.as_json
@options.local_files_only
def merge(
    path: str | None,
    base_argument: str | None,
    adapter: tuple[str, ...],
    base: str | None,
    verify: bool,
    json: bool,
    local_files_only: bool,
    **merging: Any,
) -> int:
    """Merge adapters into their base: a plain model folder that needs neither.

    Example: veneer merge path/to/adapter path/to/base --out merged
    """
    base = given_base(base_argument, base)
    with quiet() as warnings, progress("loading") as on_step:
        from veneer.merging import merge_folder

        report = merge_folder.merge(
            adapters := weighted(path, adapter), base, local_files_only=local_files_only, **merging, on_step=on_step
        )
        proof = None
        if verify:
            from veneer.merging import verify as room

            proof = room.verify(report.out, adapters, base, local_files_only=local_files_only, on_step=on_step)
    print_warnings([text for text in warnings if not any(known in text for known in report.warnings)])
    if json:
        print_warnings(report.warnings)
    if json and proof is not None:
        print(json_module.dumps({**report.to_dict(), "verify": proof.to_dict()}, indent=2))
    else:
        show(report, json)
        if proof is not None:
            show(proof, json)
    return 0 if proof is None or proof.passed else 2
