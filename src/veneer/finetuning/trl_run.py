"""Runs TRL's ``SFTTrainer`` on a base with a new adapter; importing it lets ``import peft`` mean Veneer."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before all that imports peft, which TRL does.
import veneer.as_peft  # isort: skip  # noqa: F401
import datasets
import torch
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from veneer.base_model.transformers_errors import transformers_errors_as
from veneer.configs.base import PeftConfig
from veneer.configs.lora_start_options import is_moved
from veneer.errors import BaseModelError, ConfigError, UnsupportedError, UsageError
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import ADAPTER_CONFIG
from veneer.files.resolve import resolve
from veneer.finetuning.run_options import RunOptions
from veneer.finetuning.training_data import TrainingData
from veneer.peft_model.load import load
from veneer.peft_model.peft_model import PeftModel
from veneer.peft_model.tokenizer import load_tokenizer

_REFUSED = "Compare the options, the data and the tokenizer with what it says."
_LESS_MEMORY = (
    "Take a smaller batch_size with more gradient_accumulation_steps, a smaller max_length, gradient_checkpointing, or "
    "dtype bfloat16."
)


class TrlRun:
    """Trains one new adapter on examples.

    Args:
        base: the base's folder or hub id.
        adapter: the config of the new adapter.
        data: the examples, as the loss wants them.
        options: of the run.
        folder: where the adapter and the checkpoints go.
        on_step: gets a line on each stage, and on the loss.
        **loading: keywords of :func:`veneer.load`.
    """

    def __init__(
        self,
        base: str | Path,
        adapter: PeftConfig,
        data: TrainingData,
        options: RunOptions,
        folder: Path,
        on_step: Callable[[str], None],
        **loading: Any,
    ) -> None:
        _check_trainer()
        self.folder, self.on_step = folder, on_step
        self.model = _causal_model(base, loading)
        tokenizer = _tokenizer(self.model, data, loading["trust_remote_code"])
        self.model.add_adapter("default", adapter, seed=options.seed)
        self.model.train()
        read = getattr(self.model.config, "max_position_embeddings", options.max_length)
        self.max_length = min(options.max_length, read)
        self.trainer = self._trainer(data, replace(options, max_length=self.max_length), tokenizer)
        self._check_tokens(tokenizer)

    def _trainer(self, data: TrainingData, options: RunOptions, tokenizer: Any) -> Any:
        arguments = options.arguments(bool(data.validation))
        with _quiet_datasets(), _by_trl():
            trainer = _Trainer(
                model=self.model,
                args=SFTConfig(output_dir=str(self.folder), **arguments, **_mixed_precision(self.model)),
                train_dataset=datasets.Dataset.from_list(list(data.train)),
                eval_dataset=datasets.Dataset.from_list(list(data.validation)) if data.validation else None,
                processing_class=tokenizer,
                callbacks=[_Reporter(self.on_step)],
            )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _check_tokens(self, tokenizer: Any) -> None:
        """Raise ``ConfigError`` for a token of the examples that the base has no embedding of."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) <= rows:
            return
        sets = [
            examples for examples in (self.trainer.train_dataset, self.trainer.eval_dataset) if examples is not None
        ]
        largest = max(max(ids, default=0) for examples in sets for ids in examples["input_ids"])
        if largest >= rows:
            raise ConfigError(
                f"The tokenizer gives the token {largest}, and the base knows {rows}.", hint="Is it this base's?"
            )

    def train(self, checkpoint: Path | None) -> dict[str, Any]:
        """Train, from a checkpoint on where one is given, and write the adapter.

        Returns:
            What :class:`TrainReport` has of it.

        Raises:
            ConfigError: the device's memory is too small.
        """
        trainer = self.trainer
        with _within_memory():
            output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            self.on_step("writing")
            trainer.save_model(str(self.folder))
            self._convert_start()
            eval_loss = self._final_eval_loss()
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.adapters.parameters("default")),
            "cut_examples": self._cut_examples(),
            "max_length": self.max_length,
            "steps": output.global_step,
            "epochs": trainer.state.epoch or 0.0,
            "train_loss": output.training_loss if self._has_made_steps(checkpoint) else None,
            "eval_loss": eval_loss,
        }

    def _convert_start(self) -> None:
        """Write an adapter whose start was taken off the base once more, as one that any server takes."""
        if is_moved(getattr(self.model.peft_config["default"], "init_lora_weights", None)):
            writes = self.trainer.args.should_save
            self.model.save_pretrained(self.folder, is_main_process=writes, convert_start=True)

    def _final_eval_loss(self) -> float | None:
        """Return the loss of the examples to evaluate on after the last step, measured anew where it is not logged."""
        if self.trainer.eval_dataset is None:
            return None
        last: dict[str, Any] = next((log for log in reversed(self.trainer.state.log_history) if "eval_loss" in log), {})
        if last.get("step") != self.trainer.state.global_step:
            self.on_step("evaluating")
            last = self.trainer.evaluate()
        return float(last["eval_loss"])

    def _cut_examples(self) -> int:
        rows = self.trainer.train_dataset["input_ids"]
        return sum(len(ids) >= self.max_length for ids in rows)

    def _has_made_steps(self, checkpoint: Path | None) -> bool:
        before = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        return bool(self.trainer.state.global_step > before)


def _check_trainer() -> None:
    """Raise ``UnsupportedError`` where TRL's trainer was imported before ``import peft`` meant Veneer."""
    if getattr(sys.modules[SFTTrainer.__module__], "PeftModel", None) is not PeftModel:
        raise UnsupportedError(
            "TRL's trainer was imported before Veneer took the place of peft, and knows no adapters of Veneer's.",
            hint="Import veneer.as_peft before trl.",
        )


def base_name(base: str | Path, local_files_only: bool) -> str:
    """Return what the adapter's config calls the base: its hub id, or where it lies.

    Raises:
        UsageError: it is an adapter.
    """
    source = resolve(base, LookupOptions(local_files_only=local_files_only), what="base")
    if source.has(ADAPTER_CONFIG):
        raise UsageError(f"{base} is an adapter, and a base is to be trained on.", hint="Name its base.")
    return str(source.root.resolve()) if Path(source.origin).exists() else source.origin


def _causal_model(base: str | Path, loading: Mapping[str, Any]) -> PeftModel:
    """Load the base, without adapters.

    Raises:
        BaseModelError: it is no causal language model.
    """
    model = load(base, **loading)
    if model.config.is_encoder_decoder or not model.can_generate():
        raise BaseModelError(
            f"{type(model.get_base_model()).__name__} is no causal language model, which TRL's trainer is for.",
            hint="Train it with transformers.Trainer: docs/training.md.",
        )
    return model


def _tokenizer(model: PeftModel, data: TrainingData, trust_remote_code: bool) -> Any:
    """Load the base's tokenizer.

    Raises:
        ConfigError: it has no end-of-sequence token, or no chat template where the examples need one.
    """
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"The tokenizer of {model.name_or_path} has no eos_token, and a model would not learn to end.",
            hint="Name one in its tokenizer_config.json.",
        )
    if data.needs_template and not tokenizer.chat_template:
        raise ConfigError(
            f"The examples hold messages, and the tokenizer of {model.name_or_path} has no chat template.",
            hint="Give texts as prompt and completion, or put a chat_template.jinja beside the tokenizer.",
        )
    return tokenizer


class _Trainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer without what it does beside training."""

    def _send_telemetry(self) -> None:
        """Send nothing: no run with local paths uses the network."""

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Write nothing: a card comes with each adapter that Veneer saves, and TRL's calls a local base "None"."""


class _Reporter(TrainerCallback):
    """Tells the step, the losses, and the time that is left, when the trainer logs them."""

    def __init__(self, on_step: Callable[[str], None]) -> None:
        self.on_step = on_step
        self.began = (time.monotonic(), 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.began = (time.monotonic(), state.global_step)
        self.on_step(f"step {state.global_step} of {state.max_steps}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        losses = [f"{name} {logs[name]:.4f}" for name in ("loss", "eval_loss") if name in (logs or {}) and logs]
        if not losses or not state.is_world_process_zero:
            return
        began, first = self.began
        made = state.global_step - first
        left = (time.monotonic() - began) / made * (state.max_steps - state.global_step) if made else 0.0
        self.on_step(f"step {state.global_step} of {state.max_steps}, {', '.join(losses)}, {left:.0f} s left")


def _mixed_precision(model: PeftModel) -> dict[str, bool]:
    """Return in which precision an accelerator computes: the base's, where that is a half one."""
    on_accelerator = torch.cuda.is_available()
    return {
        "bf16": on_accelerator and model.dtype == torch.bfloat16,
        "fp16": on_accelerator and model.dtype == torch.float16,
    }


@contextmanager
def _by_trl() -> Iterator[None]:
    with transformers_errors_as(ConfigError, "TRL refuses to train", _REFUSED), warnings.catch_warnings():
        # TRL passes on an option by a name that transformers 5.23 would have otherwise.
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextmanager
def _within_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError("The device's memory is too small for this run.", hint=_LESS_MEMORY) from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Silence the bars of ``datasets``, which does its work in a moment here."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
