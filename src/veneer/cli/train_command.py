"""``veneer train``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

from veneer.cli import options
from veneer.cli.options import A_PATH, PATH_OR_ID, given_base, switch
from veneer.cli.terminal import for_stdout, print_warnings, progress, show
from veneer.errors import UsageError, VeneerError
from veneer.printing import quiet


@click.command()
@click.argument("data", type=A_PATH, help="A file with an example (JSON) on each line.")
@options.base_argument
@click.option("--out", type=A_PATH, required=True, help="The folder to write: the adapter and its checkpoints.")
@click.option("--base", type=PATH_OR_ID, help="The base: a folder or hub id.")
@click.option("--validation", type=A_PATH, help="A file of examples to evaluate on.")
@click.option("--validation-split", type=float, help="Hold this share of DATA back, such as 0.05.")
@click.option("--method", help="The adapter's method; lora by default.")
@click.option("--config", type=A_PATH, help="An adapter_config.json with all options of the method.")
@click.option("--r", "--rank", "r", metavar="R", type=int, help="The rank; 16 for LoRA.")
@click.option("--alpha", type=float, help="The scale; twice the rank for LoRA.")
@click.option("--target-modules", help="What is adapted: q_proj,v_proj or all-linear, LoRA's default.")
@click.option("--loss", default="answers", help="Count answers alone, or all tokens: answers, all.")
@click.option("--epochs", type=float, help="How often to go through the examples; 3 by default.")
@click.option("--steps", "max_steps", type=int, help="In place of epochs, how many steps to make.")
@click.option("--lr", "--learning-rate", "learning_rate", default=2e-4, help="The highest learning rate.")
@click.option("--batch-size", default=4, help="Examples a device and step.")
@click.option("--accumulation", "gradient_accumulation_steps", metavar="BATCHES", default=1, help="Batches a step.")
@click.option("--max-length", default=1024, help="Tokens of an example; the rest is cut off.")
@switch("--gradient-checkpointing", "Save memory, and compute activations twice.")
@options.dtype
@click.option("--save-steps", type=int, help="Steps between checkpoints and evaluations; by default an epoch.")
@click.option("--logging-steps", default=10, help="Steps between two reports of the loss.")
@click.option("--seed", default=0, help="Of the start, the order, and what is held back.")
@switch("--resume", "Go on from the last checkpoint in OUT.")
@switch("--overwrite", "Replace the adapter that is at OUT.")
@options.as_json
@options.local_files_only
def train(
    data: Path,
    base_argument: str | None,
    out: Path,
    base: str | None,
    target_modules: str | None,
    json: bool,
    **training: Any,
) -> int:
    """Train a new adapter on examples: chats, prompts with completions, or texts.

    Example: veneer train data.jsonl --base path/to/base --out my-adapter --validation-split 0.05
    """
    base = given_base(base_argument, base)
    if base is None:
        raise UsageError("There is no base to train on.", hint="Name its folder or hub id by --base.")
    from veneer.finetuning.output import checkpoints_in, is_main_process

    is_main = is_main_process()
    with quiet() as warnings, progress("checking", lines=True) as on_step:
        from veneer.finetuning import supervised as room

        try:
            report = room.train(
                data,
                base,
                out=out,
                target_modules=_targets(target_modules),
                **training,
                on_step=on_step if is_main else lambda step: None,
            )
        except KeyboardInterrupt:
            if is_main and checkpoints_in(out):
                print("The same command with --resume goes on from the last checkpoint.", file=sys.stderr)
            raise
        except VeneerError:
            if is_main:
                raise
            return 2  # the main process says it
    if is_main:
        print_warnings(warnings)
        show(report, json)
        if not json:
            print("Next:", *map(for_stdout, report.next_commands), sep="\n  ")
    return 0


def _targets(text: str | None) -> str | list[str] | None:
    """Return the names that commas part; all-linear and regular expressions as they are."""
    if text is None or text == "all-linear" or re.search(r"[*|()\[\]\\^$+?]", text):
        return text
    return [name.strip() for name in text.split(",")]
