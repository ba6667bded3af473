"""``veneer convert``."""

from __future__ import annotations

from typing import Any

import click

from veneer.cli import options
from veneer.cli.options import A_PATH, PATH_OR_ID, given_base
from veneer.cli.terminal import print_warnings, progress, show
from veneer.errors import UsageError
from veneer.printing import quiet


@click.command()
@click.argument("path", type=PATH_OR_ID, help="The adapter's folder or hub id.")
@options.base_argument
@click.option("--out", type=A_PATH, required=True, help="The folder to write.")
@click.option("--to", default="lora", help="The method to convert to: lora.")
@click.option("--rank", type=int, help="Of the LoRA; needed where the change has no low rank.")
@options.base
@options.revision
@options.as_json
@options.local_files_only
def convert(path: str, base_argument: str | None, base: str | None, to: str, json: bool, **conversion: Any) -> None:
    """Write an adapter of any method as a plain LoRA, and say what error that leaves.

    Example: veneer convert path/to/adapter path/to/base --rank 16 --out as-lora
    """
    base = given_base(base_argument, base)
    if to != "lora":
        raise UsageError(f"--to {to!r} is none of the methods to convert to.", hint="There is: lora.")
    with quiet() as warnings, progress("converting"):
        from veneer.peft_model.convert_to_lora import convert_to_lora

        report = convert_to_lora(path, base=base, **conversion)
    print_warnings(warnings)
    show(report, json)
