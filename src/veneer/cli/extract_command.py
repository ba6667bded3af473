"""``veneer extract``."""

from __future__ import annotations

from typing import Any

import click

from veneer.cli import options
from veneer.cli.options import A_PATH, PATH_OR_ID
from veneer.cli.terminal import print_warnings, progress, show
from veneer.configs.dtype_names import torch_name
from veneer.errors import UsageError
from veneer.printing import quiet


def _dtype(context: click.Context, parameter: click.Parameter, name: str) -> str:
    if name == "auto":
        raise UsageError("--dtype auto says nothing of a new adapter.", hint="Name one: float32, bfloat16 or float16.")
    return torch_name(name)


@click.command()
@click.option("--tuned", type=PATH_OR_ID, required=True, help="The tuned model's folder or hub id.")
@click.option("--base", type=PATH_OR_ID, required=True, help="The model that it was tuned from.")
@click.option("--out", type=A_PATH, required=True, help="The adapter's folder.")
@click.option("--rank", default=16, help="Of each layer, at most.")
@click.option("--energy", type=float, help="Share of a layer's change that suffices, such as 0.95.")
@click.option(
    "--dtype",
    default="float32",
    callback=_dtype,
    help="Of the adapter: float32 (fp32), bfloat16 (bf16), float16 (fp16).",
)
@options.overwrite
@options.as_json
@options.local_files_only
def extract(tuned: str, base: str, json: bool, **extraction: Any) -> None:
    """Make a LoRA adapter out of a tuned model and its base.

    Example: veneer extract --tuned path/to/model --base path/to/base --rank 16 --out adapter
    """
    with quiet() as warnings, progress("reading") as on_step:
        from veneer.merging import extract_lora as room

        report = room.extract(tuned, base, **extraction, on_step=on_step)
    print_warnings(warnings)
    show(report, json)
