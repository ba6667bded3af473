"""Fine-tunes an adapter on a file of examples, by TRL's ``SFTTrainer``: ``veneer.train``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer.configs.base import PeftConfig
from veneer.errors import UsageError
from veneer.finetuning.method_options import method_config
from veneer.finetuning.output import check_run_folder, is_main_process, remove_checkpoints
from veneer.finetuning.run_options import RunOptions
from veneer.finetuning.train_report import TrainReport
from veneer.finetuning.training_data import read_data
from veneer.keywords import takes
from veneer.packages import require

_LOSSES = ("answers", "all")


@takes()
def train(
    data: str | Path,
    base: str | Path,
    *,
    out: str | Path,
    validation: str | Path | None = None,
    validation_split: float | None = None,
    method: str | None = None,
    config: PeftConfig | str | Path | None = None,
    r: int | None = None,
    alpha: float | None = None,
    target_modules: str | list[str] | None = None,
    loss: str = "answers",
    epochs: float | None = None,
    max_steps: int | None = None,
    learning_rate: float = 2e-4,
    batch_size: int = 4,
    gradient_accumulation_steps: int = 1,
    max_length: int = 1024,
    gradient_checkpointing: bool = False,
    dtype: Any = "auto",
    save_steps: int | None = None,
    logging_steps: int = 10,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
) -> TrainReport:
    """Train a new adapter of a base on examples, and write it with its checkpoints.

    TRL and the libraries that it uses import peft by name: from here on ``import peft`` means Veneer in this process,
    as ``import veneer.as_peft`` has it. Under ``accelerate launch`` the main process alone writes.

    Args:
        data: a file with an example on each line: ``{"messages": [...]}``, ``{"prompt": ..., "completion": ...}`` or
            ``{"text": ...}``.
        base: the base's folder or hub id.
        out: the folder to write. It must not exist or be empty, unless ``overwrite`` or ``resume``.
        validation: a file of examples to evaluate on.
        validation_split: in its place, the share of ``data`` to hold back for that.
        method: the adapter's method; LoRA where neither it nor ``config`` is given.
        config: the adapter's whole config, or the path of one, in the place of the next three.
        r: the rank; 16 for LoRA.
        alpha: the scale; twice the rank for LoRA.
        target_modules: what is adapted; every linear layer for LoRA.
        loss: ``"answers"`` counts completions and the assistant's messages alone, ``"all"`` every token.
        epochs: how often to go through the examples; 3 where ``max_steps`` is not given either.
        max_steps: how many steps to make.
        learning_rate: the highest; it falls to zero linearly.
        batch_size: examples a device and step.
        gradient_accumulation_steps: so many batches make one step.
        max_length: tokens of an example, at most as many as the base reads; what comes behind is cut off.
        gradient_checkpointing: save memory by computing activations twice.
        dtype: of the base; ``"auto"`` keeps that of its files. The adapter is trained in float32.
        save_steps: steps between two checkpoints, at which is evaluated too; by default each epoch has one. The last
            two are kept.
        logging_steps: steps between two reports of the loss to ``on_step``.
        seed: of the adapter's start, the order of the examples, and what is held back.
        resume: go on from the last checkpoint in ``out``.
        overwrite: replace the adapter and the checkpoints in ``out``.
        local_files_only: never use the network.
        trust_remote_code: run code that comes with the base.
        on_step: called with a line on each stage, and on the loss, for a display.

    Raises:
        UsageError: an option is wrong. CorruptFileError: a line of the data is no example. OutputError: ``out`` is
            taken or cannot be written. UnsupportedError: TRL is not installed, or peft itself is imported already.
            SourceError, BaseModelError, TargetError: as loading and adding an adapter raise.
    """
    started = time.perf_counter()
    on_step("checking the data")
    options = RunOptions(
        epochs,
        max_steps,
        learning_rate,
        batch_size,
        gradient_accumulation_steps,
        max_length,
        gradient_checkpointing,
        save_steps,
        logging_steps,
        seed,
    )
    options.check(validation_split)
    if loss not in _LOSSES:
        raise UsageError(f"loss is {loss!r}, none of {', '.join(_LOSSES)}.")
    if validation is not None and validation_split is not None:
        raise UsageError(
            "Examples to evaluate on are given, and a share to hold back.", hint="Leave out one of the two."
        )
    adapter = method_config(method, config, r, alpha, target_modules)
    folder = Path(out)
    # Another process may come when the main one has made the folder.
    checkpoint = check_run_folder(folder, overwrite, resume) if is_main_process() or resume else None
    examples = read_data(Path(data), None if validation is None else Path(validation), validation_split, seed)
    require("Training", "trl", "datasets", "accelerate", extra="train")
    on_step("loading")
    from veneer.finetuning.trl_run import TrlRun, base_name

    run = TrlRun(
        base,
        replace(adapter, base_model_name_or_path=base_name(base, local_files_only)),
        examples.answers_apart() if loss == "answers" else examples,
        options,
        folder,
        on_step,
        dtype=dtype,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
    )
    if is_main_process() and not resume:
        remove_checkpoints(folder)
    result = run.train(checkpoint)
    return TrainReport(
        data=str(data),
        base=str(base),
        out=str(folder),
        method=str(adapter.peft_type),
        examples=len(examples.train),
        validation_examples=len(examples.validation),
        seconds=time.perf_counter() - started,
        **result,
    )
