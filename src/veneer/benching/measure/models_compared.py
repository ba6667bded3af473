"""Loads the models that are compared, side by side in memory: they share the weights that they have in common."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.merge.in_memory import check_mergeable
from veneer.benching.evaluation_samples import EvaluationSample
from veneer.benching.inputs import AdapterInput, Inventory
from veneer.benching.measure.perplexity import PredictedTokens, tokenized
from veneer.benching.measure.workloads import Inputs, Workload, workload_of
from veneer.errors import SourceError, UnsupportedError, UsageError, VeneerError
from veneer.peft_model.load import load
from veneer.peft_model.peft_model import PeftModel
from veneer.peft_model.tokenizer import load_tokenizer

# Prompts for a model of text with a tokenizer, where the user gives none.
PROMPTS = (
    "What is the difference between a lake and a sea?",
    "Explain in two sentences how a refrigerator works.",
    "Write a short note that thanks a neighbour for watering the plants.",
    "Name three things to check before a long journey by car.",
    "Translate to French: the train leaves at nine in the morning.",
    "What is 17 plus 25?",
    "Summarise: the river rose overnight, the bridge was closed, and the market moved to the school.",
    "Why does bread rise when it is baked?",
)
# How many made inputs are compared where there is no text.
_ROWS = 8


@dataclass(frozen=True)
class ModelsCompared:
    """The models that are measured.

    Attributes:
        base: the plain base model.
        merged: a plain model with the hottest adapter merged.
        resident: the base with that adapter, whose merged weights are kept beside it; ``None`` where none can be.
        single: the base with that adapter, unmerged.
        several: the base with all adapters, unmerged.
        workload: runs them.
        questions: inputs of one row each, for comparing answers.
        prompt_source: where the text came from.
        texts: the texts on which perplexity is measured.
        warnings: of loading.
    """

    base: Any
    merged: Any
    resident: PeftModel | None
    single: PeftModel
    several: PeftModel
    workload: Workload
    questions: tuple[Inputs, ...]
    prompt_source: str
    texts: tuple[PredictedTokens, ...]
    warnings: tuple[str, ...]


def load_models(
    inventory: Inventory,
    adapters: Sequence[AdapterInput],
    *,
    dtype: Any,
    device: torch.device,
    prompts: str | Path | None,
    samples: Sequence[EvaluationSample] = (),
    local_files_only: bool,
) -> ModelsCompared:
    """Load the base once, and make the models that are compared of it.

    Args:
        inventory: the base and the adapters that were found.
        adapters: the adapters to measure; the hottest first.
        dtype: of the base.
        device: of the models.
        prompts: a file with a prompt on each line.
        samples: the texts on which perplexity is measured.
        local_files_only: use no network.

    Raises:
        MergeError: one of the adapters cannot be merged. Whatever loading raises.
    """
    texts = None if prompts is None else _lines(Path(prompts))
    loaded = load(inventory.entry, base=inventory.base, dtype=dtype, local_files_only=local_files_only)
    tokenizer = _tokenizer(loaded, needed=texts is not None or bool(samples))
    load_warnings = loaded.load_report.warnings if loaded.load_report is not None else []
    base = loaded.unload().to(device)
    questions, prompt_source = _questions(base, tokenizer, texts)
    workload = workload_of(base, torch.cat(questions) if questions else None)
    if samples and workload.kind != "causal":
        raise UsageError(f"{type(base).__name__} continues no text.", hint="Leave --perplexity out.")
    predicted = tokenized(samples, tokenizer) if samples else ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading has given them once
        several = _on(base, adapters)
        check_mergeable(several.adapters, [adapter.name for adapter in adapters])
        return ModelsCompared(
            base=base,
            merged=_on(base, adapters[:1]).merge_and_unload(),
            resident=_resident(base, adapters[:1]),
            single=_on(base, adapters[:1]),
            several=several,
            workload=workload,
            questions=tuple(_rows(workload, questions, device)),
            prompt_source=prompt_source,
            texts=tuple(predicted),
            warnings=tuple(dict.fromkeys(load_warnings)),
        )


def _questions(base: Any, tokenizer: Any, texts: Sequence[str] | None) -> tuple[list[Tensor], str]:
    """Return the ids of each prompt, none for a model without text or tokenizer, and where they come from."""
    if base.main_input_name != "input_ids":
        if texts is not None:
            raise UsageError(
                f"{type(base).__name__} reads {base.main_input_name}, not text.", hint="Leave --prompts out."
            )
        return [], "random values"
    if tokenizer is None:
        return [], "random token ids"
    source = "the prompts given" if texts else "eight prompts that come with Veneer"
    return [_encoded(tokenizer, text) for text in texts or PROMPTS], source


def shared_copy(model: nn.Module) -> Any:
    """Copy a model's tree of modules over the same tensors."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of tensors, memory that several share once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _on(base: nn.Module, adapters: Sequence[AdapterInput]) -> PeftModel:
    first, *others = adapters
    model = PeftModel.from_pretrained(shared_copy(base), first.root, adapter_name=first.name)
    for adapter in others:
        model.load_adapter(adapter.root, adapter_name=adapter.name)
    return model


def _resident(base: nn.Module, adapters: Sequence[AdapterInput]) -> PeftModel | None:
    model = _on(base, adapters)
    try:
        model.keep_merged(adapters[0].name)
    except UnsupportedError:  # none of its layers can keep one
        return None
    return model


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise SourceError(f"The prompts {file} cannot be read: {reason}.", hint="One prompt on each line.") from error
    if not any(lines):
        raise SourceError(f"The prompts {file} are empty.", hint="One prompt on each line.")
    return [line for line in lines if line]


def _tokenizer(model: PeftModel, needed: bool) -> Any:
    if needed:
        return load_tokenizer(model)
    with suppress(VeneerError):
        return load_tokenizer(model)
    return None


def _encoded(tokenizer: Any, text: str) -> Tensor:
    """Return a prompt's ids, shape ``(n,)``, by the tokenizer's chat template if it has one."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": text}]
        with suppress(Exception):  # a template is code of its own; the plain text is a prompt too
            rows = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            return rows["input_ids"][0]  # type: ignore[no-any-return]
    return tokenizer(text, return_tensors="pt")["input_ids"][0]  # type: ignore[no-any-return]


def _rows(workload: Workload, questions: Sequence[Tensor], device: torch.device) -> list[Inputs]:
    """Return each question as a batch of one; made inputs where there is no text."""
    if questions:
        rows = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in questions if len(ids)]
    else:
        batch = workload.feed(_ROWS, workload.question_length)
        rows = [{name: values[row : row + 1] for name, values in batch.items()} for row in range(_ROWS)]
    return [{name: values.to(device) for name, values in row.items()} for row in rows]
