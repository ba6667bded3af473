"""Options that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from veneer.configs.dtype_names import torch_name
from veneer.errors import UsageError
from veneer.files.paths import exists


def _seed(value: int | None) -> int | None:
    """Check a seed as torch takes it; typer would print the limits in the help."""
    if value is not None and not 0 <= value < 2**63:
        raise UsageError(f"--seed {value} is out of range.", hint="Give a whole number from 0 to 2**63 - 1.")
    return value


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Base = Annotated[str | None, typer.Option(help="The base: a folder or hub id. By default what the adapter names.")]
Dtype = Annotated[
    str,
    typer.Option(callback=torch_name, help="auto (as on disk), bfloat16 (bf16), float16 (fp16), float32 (fp32)."),
]
BaseArgument = Annotated[str | None, typer.Argument(metavar="BASE", help="The base, as --base has it.")]
Device = Annotated[str | None, typer.Option(help="Such as cuda; by default the CPU.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "--max-tokens", min=1, help="At most this many tokens.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be given several times.")]
System = Annotated[str | None, typer.Option(help="The system message of the chat.")]
Template = Annotated[bool, typer.Option("--chat/--no-chat", help="Use the tokenizer's chat template, if it has one.")]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="0 takes the likeliest token; by default 1 with --top-p or --top-k.")
]
TopP = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens with this probability.")
]
TopK = Annotated[int | None, typer.Option(min=0, help="Sample from this many tokens; 0: from all.")]
Seed = Annotated[int | None, typer.Option(callback=_seed, help="Of the sampling; 0 or more.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Local = Annotated[bool, typer.Option("--local-files-only", help="Use no network.")]


def given_base(argument: str | None, option: str | None) -> str | None:
    """Return the base that is given as an argument or as ``--base``."""
    if argument is not None and option is not None:
        raise UsageError(f"The base is given twice: {argument} and --base {option}.", hint="Leave out one of the two.")
    return option if argument is None else argument


def weighted(path: str | None, adapters: list[str]) -> dict[str | Path, float]:
    """Return adapter -> weight, from ``PATH`` and ``PATH=WEIGHT``, in the order given."""
    weights: dict[str | Path, float] = {} if path is None else {path: 1.0}
    for text in adapters:
        name, weight = _split(text)
        if name in weights:
            raise UsageError(f"{name} is given twice.", hint="Give each once, with one weight.")
        weights[name] = weight
    return weights


def _split(text: str) -> tuple[str, float]:
    name, mark, weight = text.rpartition("=")
    if not mark or exists(Path(text)):
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise UsageError(f"{text!r}: {weight!r} is no weight.", hint="Give PATH or PATH=0.7.")
    return name, value
