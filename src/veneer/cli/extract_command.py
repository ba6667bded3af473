"""``veneer extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.options import Json, Local
from veneer.cli.terminal import print_warnings, progress, show
from veneer.configs.dtype_names import torch_name
from veneer.errors import UsageError
from veneer.printing import quiet


def _dtype(name: str) -> str:
    if name == "auto":
        raise UsageError("--dtype auto says nothing of a new adapter.", hint="Name one: float32, bfloat16 or float16.")
    return torch_name(name)


def extract(
    tuned: Annotated[str, typer.Option(help="The tuned model's folder or hub id.")],
    base: Annotated[str, typer.Option(help="The model that it was tuned from.")],
    out: Annotated[Path, typer.Option(help="The adapter's folder.")],
    rank: Annotated[int, typer.Option(help="Of each layer, at most.")] = 16,
    energy: Annotated[float | None, typer.Option(help="Share of a layer's change that suffices, such as 0.95.")] = None,
    dtype: Annotated[
        str, typer.Option(callback=_dtype, help="Of the adapter: float32 (fp32), bfloat16 (bf16), float16 (fp16).")
    ] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is at OUT.")] = False,
    json: Json = False,
    local_files_only: Local = False,
) -> None:
    """Make a LoRA adapter out of a tuned model and its base.

    Example: veneer extract --tuned path/to/model --base path/to/base --rank 16 --out adapter
    """
    with quiet() as warnings, progress("reading") as on_step:
        from veneer.merging import extract_lora as room

        report = room.extract(
            tuned,
            base,
            out=out,
            rank=rank,
            energy=energy,
            dtype=dtype,
            overwrite=overwrite,
            local_files_only=local_files_only,
            on_step=on_step,
        )
    print_warnings(warnings)
    show(report, json)
