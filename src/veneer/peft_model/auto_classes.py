"""Gives transformers' Auto classes for any path: each fixes a task, and loads as :func:`veneer.load` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from veneer.configs.names import TaskType
from veneer.keywords import takes
from veneer.peft_model.load import load
from veneer.peft_model.peft_model import PeftModel


class AutoPeftModel:
    """Loads a model from any path: adapter, full model, merged folder or set; its task is that of the files."""

    task: ClassVar[str | None] = None

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} is not made itself; call {type(self).__name__}.from_pretrained(path).")

    @classmethod
    @takes(renamed={"pretrained_model_name_or_path": "path"}, others=True)
    def from_pretrained(
        cls, path: str | Path, adapter_name: str = "default", is_trainable: bool = False, **options: Any
    ) -> PeftModel:
        """Load ``path``; the options are those of :func:`veneer.load`.

        ``import_allowlist``, by which peft limits the libraries that an adapter's config lets it import, is accepted:
        none is imported here.
        """
        options.pop("import_allowlist", None)
        options.setdefault("task", cls.task)
        return load(path, adapter_name=adapter_name, is_trainable=is_trainable, **options)


class AutoModelForCausalLM(AutoPeftModel):
    """Loads a causal language model from any path."""

    task = TaskType.CAUSAL_LM.value


class AutoModelForSeq2SeqLM(AutoPeftModel):
    """Loads an encoder-decoder language model from any path."""

    task = TaskType.SEQ_2_SEQ_LM.value


class AutoModelForSequenceClassification(AutoPeftModel):
    """Loads a sequence classifier from any path."""

    task = TaskType.SEQ_CLS.value


class AutoModelForTokenClassification(AutoPeftModel):
    """Loads a token classifier from any path."""

    task = TaskType.TOKEN_CLS.value


class AutoModelForQuestionAnswering(AutoPeftModel):
    """Loads a model for extractive question answering from any path."""

    task = TaskType.QUESTION_ANS.value


class AutoModelForFeatureExtraction(AutoPeftModel):
    """Loads a model without a head from any path."""

    task = TaskType.FEATURE_EXTRACTION.value


class AutoModelForImageClassification(AutoPeftModel):
    """Loads an image classifier from any path."""

    task = "IMAGE_CLASSIFICATION"


class AutoModelForSpeechSeq2Seq(AutoPeftModel):
    """Loads a speech recogniser from any path."""

    task = "SPEECH_SEQ_2_SEQ"


class AutoModelForImageTextToText(AutoPeftModel):
    """Loads a vision-language model from any path."""

    task = "IMAGE_TEXT_TO_TEXT"


# peft's names for the same.
AutoPeftModelForCausalLM = AutoModelForCausalLM
AutoPeftModelForSeq2SeqLM = AutoModelForSeq2SeqLM
AutoPeftModelForSequenceClassification = AutoModelForSequenceClassification
AutoPeftModelForTokenClassification = AutoModelForTokenClassification
AutoPeftModelForQuestionAnswering = AutoModelForQuestionAnswering
AutoPeftModelForFeatureExtraction = AutoModelForFeatureExtraction
