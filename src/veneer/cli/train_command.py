"""``veneer train``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.options import BaseArgument, Dtype, Json, Local, given_base
from veneer.cli.terminal import for_stdout, print_warnings, progress, show
from veneer.errors import UsageError, VeneerError
from veneer.printing import quiet


def train(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A file with an example (JSON) on each line.")],
    out: Annotated[Path, typer.Option(help="The folder to write: the adapter and its checkpoints.")],
    base_argument: BaseArgument = None,
    base: Annotated[str | None, typer.Option(help="The base: a folder or hub id.")] = None,
    validation: Annotated[Path | None, typer.Option(help="A file of examples to evaluate on.")] = None,
    validation_split: Annotated[float | None, typer.Option(help="Hold this share of DATA back, such as 0.05.")] = None,
    method: Annotated[str | None, typer.Option(help="The adapter's method; lora by default.")] = None,
    config: Annotated[Path | None, typer.Option(help="An adapter_config.json with all options of the method.")] = None,
    r: Annotated[int | None, typer.Option("--r", "--rank", help="The rank; 16 for LoRA.")] = None,
    alpha: Annotated[float | None, typer.Option(help="The scale; twice the rank for LoRA.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="What is adapted: q_proj,v_proj or all-linear, LoRA's default.")
    ] = None,
    loss: Annotated[str, typer.Option(help="Count answers alone, or all tokens: answers, all.")] = "answers",
    epochs: Annotated[float | None, typer.Option(help="How often to go through the examples; 3 by default.")] = None,
    steps: Annotated[int | None, typer.Option(help="In place of epochs, how many steps to make.")] = None,
    lr: Annotated[float, typer.Option("--lr", "--learning-rate", help="The highest learning rate.")] = 2e-4,
    batch_size: Annotated[int, typer.Option(help="Examples a device and step.")] = 4,
    accumulation: Annotated[int, typer.Option(help="Batches a step.")] = 1,
    max_length: Annotated[int, typer.Option(help="Tokens of an example; the rest is cut off.")] = 1024,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Save memory, and compute activations twice.")
    ] = False,
    dtype: Dtype = "auto",
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints and evaluations; by default an epoch.")
    ] = None,
    logging_steps: Annotated[int, typer.Option(help="Steps between two reports of the loss.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the start, the order, and what is held back.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter that is at OUT.")] = False,
    json: Json = False,
    local_files_only: Local = False,
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
                validation=validation,
                validation_split=validation_split,
                method=method,
                config=config,
                r=r,
                alpha=alpha,
                target_modules=_targets(target_modules),
                loss=loss,
                epochs=epochs,
                max_steps=steps,
                learning_rate=lr,
                batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                max_length=max_length,
                gradient_checkpointing=gradient_checkpointing,
                dtype=dtype,
                save_steps=save_steps,
                logging_steps=logging_steps,
                seed=seed,
                resume=resume,
                overwrite=overwrite,
                local_files_only=local_files_only,
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
