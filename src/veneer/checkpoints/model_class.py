"""Chooses the transformers class, the dtype and the number of labels that a base is loaded with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from veneer.base_model.catalog import Catalog
from veneer.base_model.meta_model import meta_model
from veneer.base_model.transformers_internals import classes_for, named_class
from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.layouts.closeness import Closeness
from veneer.checkpoints.layouts.older_layouts import closeness
from veneer.configs.dtype_names import torch_name, unknown_dtype
from veneer.configs.names import HEADS, TaskType
from veneer.errors import BaseModelError, UsageError, VeneerError
from veneer.files.names import MODEL_CONFIG
from veneer.files.source import Source
from veneer.files.tensor_keys import PREFIX, SHARED_PREFIX

# task -> the transformers class that builds it when the base's own class is for another task.
TASK_CLASSES = {
    TaskType.CAUSAL_LM.value: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM.value: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS.value: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS.value: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS.value: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION.value: "AutoModel",
    "IMAGE_CLASSIFICATION": "AutoModelForImageClassification",
    "SPEECH_SEQ_2_SEQ": "AutoModelForSpeechSeq2Seq",
    "IMAGE_TEXT_TO_TEXT": "AutoModelForImageTextToText",
}


def class_for(
    source: Source,
    config: dict[str, Any],
    checkpoints: Sequence[Checkpoint],
    task: str | None,
    trust_remote_code: bool = False,
) -> Any:
    """Choose the class that a base is built as for its adapters.

    Adapters of vision-language models mostly say CAUSAL_LM, and Whisper's SEQ_2_SEQ_LM: where the base's type has no
    class for an adapter's task, or that class lacks layers that the class in its config has, the latter is taken.

    Args:
        source: the base.
        config: its config.
        checkpoints: the adapters; the first that names a task decides.
        task: the task that the caller asks for; it decides instead.
        trust_remote_code: run code that comes with the base.

    Raises:
        UsageError: the task is unknown. BaseModelError: the base names no class, or has none for ``task``.
    """
    if task is not None:
        kind = _class_of(config, task, source.origin)
        _check_has_class(config, task, source.origin)
        return kind
    task = wanted_task(None, checkpoints)
    kind, named = _class_of(config, task, source.origin), named_class(config)
    if task is None or named is None or kind is named or "auto_map" in config:
        return kind
    if not _classes(config, task):
        return named
    if HEADS.get(task):  # which no other class has
        return kind
    fit = _closeness(kind, source, checkpoints, trust_remote_code)
    fits_better = fit is not Closeness.EXACT and _closeness(named, source, checkpoints, trust_remote_code) > fit
    return named if fits_better else kind


def wanted_task(task: str | None, checkpoints: Sequence[Checkpoint]) -> str | None:
    """Return the task that was asked for; else that of the first adapter that names one."""
    return task or next((str(c.config.task_type) for c in checkpoints if c.config.task_type), None)


def note_of(kind: Any, config: dict[str, Any], checkpoints: Sequence[Checkpoint], task: str | None) -> list[str]:
    """Note where the base is built as the class in its config, though the adapter's task has another."""
    recorded = None if task is not None else wanted_task(None, checkpoints)
    if recorded is None or kind is not named_class(config) or kind.__name__ in _classes(config, recorded):
        return []
    return [
        f"The adapter says task_type={recorded}, and no {TASK_CLASSES[recorded]} of this base has the layers that it "
        f"changes: the base is built as {kind.__name__}, which its config names."
    ]


def _classes(config: dict[str, Any], task: str) -> tuple[str, ...]:
    """Return the names of the classes that transformers has for a model type and a task."""
    return classes_for(TASK_CLASSES[task], config.get("model_type", ""))


def _class_of(config: dict[str, Any], task: str | None, origin: str) -> Any:
    """Return the class in a base's config when it is for the task, else the task's."""
    import transformers

    if task is not None and task not in TASK_CLASSES:
        raise UsageError(f"Unknown task {task!r}.", hint=f"Known: {', '.join(TASK_CLASSES)}.")
    names, model_type = config.get("architectures") or [], config.get("model_type", "")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or not isinstance(model_type, str):
        raise BaseModelError(
            f"{origin}/{MODEL_CONFIG}: architectures={names!r} and model_type={model_type!r} name no model class.",
            hint="Copy the config again from where the model came from.",
        )
    named = named_class(config)
    if task is None:
        return named or transformers.AutoModel
    if named is not None and named.__name__ in _classes(config, task):
        return named
    return getattr(transformers, TASK_CLASSES[task])


def _check_has_class(config: dict[str, Any], task: str, origin: str) -> None:
    """Raise ``BaseModelError`` where a known model type has no class for a task that was asked for."""
    named = named_class(config)
    if named is None or "auto_map" in config or _classes(config, task):
        return
    usual = [other for other in TASK_CLASSES if named.__name__ in _classes(config, other)]
    raise BaseModelError(
        f"{origin}: transformers has no {TASK_CLASSES[task]} for the model type {config.get('model_type')!r}.",
        hint=f"Without task= it is built as {named.__name__}" + (f", as with task={usual[0]!r}." if usual else "."),
    )


def _closeness(kind: Any, source: Source, checkpoints: Sequence[Checkpoint], trust_remote_code: bool) -> Closeness:
    """Grade how well the modules that adapters change are those of a class; the worst adapter counts."""
    try:
        catalog = Catalog(meta_model(kind, source, trust_remote_code))
    except VeneerError:
        return Closeness.NONE
    return min(closeness(checkpoint, catalog) for checkpoint in checkpoints)


# The weights of heads, whose rows are as many as the labels that they were trained for.
_HEAD_WEIGHTS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def dtype_of(dtype: Any) -> Any:
    """Return a dtype by its name; ``"auto"`` and anything but a string is left to transformers."""
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    named = getattr(torch, torch_name(dtype), None)
    if not isinstance(named, torch.dtype):
        raise unknown_dtype(dtype)
    return named


def labels_of(checkpoints: list[Checkpoint]) -> int | None:
    """Return the number of labels that an adapter's own head was trained for, by its header."""
    for checkpoint in checkpoints:
        if checkpoint.config.task_type not in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
            continue
        for ending in _HEAD_WEIGHTS:
            info = checkpoint.tensors.get(PREFIX + ending) or checkpoint.tensors.get(SHARED_PREFIX + ending)
            if info is not None:
                return int(info.shape[0])
    return None
