"""``veneer convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from veneer.cli import options
from veneer.cli.options import A_PATH, PATH_OR_ID
from veneer.cli.terminal import print_warnings, progress, show
from veneer.errors import UsageError
from veneer.printing import quiet


@click.command()
@click.argument("source", metavar="ADAPTER", type=PATH_OR_ID, help="The adapter: a folder, a file or a hub id.")
@click.argument("out", metavar="OUT", type=A_PATH, required=False, help="The folder or file to write.")
@click.option(
    "--to",
    default="peft",
    help="The format: peft, mlx, gguf, diffusers, comfyui, kohya, lycoris, or serving, which is PEFT's for any server.",
)
@options.base
@options.switch("--as-lora", "Make a plain LoRA of an adapter of another method first.")
@click.option("--rank", type=int, help="Of that LoRA; needed where the change has no low rank.")
@click.option("--experts", help="How a file that does not say it lays out fused experts: grouped or rank-major.")
@click.option("--component", help="The part of a pipeline, such as unet; by default all.")
@click.option("--scaling", help="What an alpha meant to the version of MLX that trained it: plain or alpha/rank.")
@options.revision
@options.as_json
@options.local_files_only
@click.option("--out", "old_out", type=A_PATH, hidden=True)
def convert(source: str, out: Path | None, old_out: Path | None, json: bool, **conversion: Any) -> None:
    """Write an adapter in another tool's format, or of another method as a plain LoRA.

    Example: veneer convert path/to/adapter adapter.gguf --to gguf --base path/to/base
    """
    out = _given_out(source, out, old_out, conversion["to"])
    with quiet() as warnings, progress("converting"):
        from veneer.peft_model.convert import convert

        report = convert(source, out, **conversion)
    print_warnings(warnings)
    show(report, json)


def _given_out(source: str, out: Path | None, old_out: Path | None, to: str) -> Path:
    """Return the output's path; the spelling of earlier versions gets an error that tells the new one."""
    if old_out is not None or to == "lora":
        base = "" if out is None or old_out is None else f" --base {out}"
        raise UsageError(
            "`veneer convert` takes the output as its second argument, and --as-lora for a plain LoRA.",
            hint=f"veneer convert {source} {old_out or out or 'OUT'} --as-lora{base}",
        )
    if out is None:
        raise UsageError("There is no output.", hint=f"veneer convert {source} OUT --to FORMAT")
    return out
