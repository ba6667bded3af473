"""The names of methods and tasks as they stand in ``adapter_config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class _Name(str, Enum):
    """A string with a closed set of values that prints as its value."""

    def __str__(self) -> str:
        return str(self.value)


class PeftType(_Name):
    """The methods of the field, by the name that stands in ``adapter_config.json``."""

    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    BEFT = "BEFT"
    BOFT = "BOFT"
    BONE = "BONE"
    C3A = "C3A"
    CARTRIDGE = "CARTRIDGE"
    CPT = "CPT"
    DEFT = "DEFT"
    DELORA = "DELORA"
    FOURIERFT = "FOURIERFT"
    FROD = "FROD"
    GLORA = "GLORA"
    GRALORA = "GRALORA"
    HIRA = "HIRA"
    HRA = "HRA"
    IA3 = "IA3"
    LILY = "LILY"
    LN_TUNING = "LN_TUNING"
    LOHA = "LOHA"
    LOKR = "LOKR"
    LORA = "LORA"
    MISS = "MISS"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    OFT = "OFT"
    OSF = "OSF"
    PEANUT = "PEANUT"
    POLY = "POLY"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    PSOFT = "PSOFT"
    PVERA = "PVERA"
    P_TUNING = "P_TUNING"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    SHADOW = "SHADOW"
    SHIRA = "SHIRA"
    SUPERTUNING = "SUPERTUNING"
    TINYLORA = "TINYLORA"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    UNILORA = "UNILORA"
    VBLORA = "VBLORA"
    VERA = "VERA"
    WAVEFT = "WAVEFT"
    XLORA = "XLORA"


class PromptTuningInit(_Name):
    """The starts of prompt tuning, as ``prompt_tuning_init`` names them."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class MultitaskPromptTuningInit(_Name):
    """The starts of multitask prompt tuning, as ``prompt_tuning_init`` names them."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


class PromptEncoderReparameterizationType(_Name):
    """The networks of p-tuning, as ``encoder_reparameterization_type`` names them."""

    MLP = "MLP"
    LSTM = "LSTM"


class TaskType(_Name):
    """The tasks of models, as PEFT writes them."""

    CAUSAL_LM = "CAUSAL_LM"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    SEQ_CLS = "SEQ_CLS"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


# New layers that a task's head needs trained, and that PEFT therefore saves whole.
HEADS: Mapping[str, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
