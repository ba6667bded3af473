"""Veneer: the runtime for parameter-efficient fine-tuned models.

``veneer.load(path)`` takes an adapter, a full model or a merged one and returns one model object with every
feature. Importing this module imports no torch; each name is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from veneer._version import __version__

if TYPE_CHECKING:
    from veneer.arrow import create_arrow_model
    from veneer.arrow_config import ArrowConfig
    from veneer.auto import (
        AutoModelForCausalLM,
        AutoModelForFeatureExtraction,
        AutoModelForImageClassification,
        AutoModelForImageTextToText,
        AutoModelForQuestionAnswering,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForSpeechSeq2Seq,
        AutoModelForTokenClassification,
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from veneer.benching.result import BenchReport
    from veneer.benching.run import bench
    from veneer.config import PeftConfig, PeftType, TaskType
    from veneer.configs.adalora import AdaLoraConfig
    from veneer.configs.adamss import AdamssConfig
    from veneer.configs.adaption_prompt import AdaptionPromptConfig
    from veneer.configs.beft import BeftConfig
    from veneer.configs.boft import BOFTConfig
    from veneer.configs.bone import BoneConfig
    from veneer.configs.c3a import C3AConfig
    from veneer.configs.cartridge import CartridgeConfig
    from veneer.configs.cpt import CPTConfig
    from veneer.configs.deft import DeftConfig
    from veneer.configs.delora import DeloraConfig
    from veneer.configs.fourierft import FourierFTConfig
    from veneer.configs.frod import FrodConfig
    from veneer.configs.glora import GloraConfig
    from veneer.configs.gralora import GraloraConfig
    from veneer.configs.hira import HiraConfig
    from veneer.configs.hra import HRAConfig
    from veneer.configs.ia3 import IA3Config
    from veneer.configs.lily import LilyConfig
    from veneer.configs.ln_tuning import LNTuningConfig
    from veneer.configs.loha import LoHaConfig
    from veneer.configs.lokr import LoKrConfig
    from veneer.configs.lora import LoraConfig
    from veneer.configs.miss import MissConfig
    from veneer.configs.multitask_prompt_tuning import MultitaskPromptTuningConfig
    from veneer.configs.oft import OFTConfig
    from veneer.configs.osf import OSFConfig
    from veneer.configs.p_tuning import PromptEncoderConfig
    from veneer.configs.peanut import PeanutConfig
    from veneer.configs.poly import PolyConfig
    from veneer.configs.prefix_tuning import PrefixTuningConfig
    from veneer.configs.prompt_tuning import PromptTuningConfig
    from veneer.configs.psoft import PsoftConfig
    from veneer.configs.pvera import PveraConfig
    from veneer.configs.randlora import RandLoraConfig
    from veneer.configs.road import RoadConfig
    from veneer.configs.shadow import ShadowConfig
    from veneer.configs.shira import ShiraConfig
    from veneer.configs.supertuning import SupertuningConfig
    from veneer.configs.tinylora import TinyLoraConfig
    from veneer.configs.trainable_tokens import TrainableTokensConfig
    from veneer.configs.unilora import UniLoraConfig
    from veneer.configs.vblora import VBLoRAConfig
    from veneer.configs.vera import VeraConfig
    from veneer.configs.waveft import WaveFTConfig
    from veneer.configs.xlora import XLoraConfig
    from veneer.convert import ConversionReport, convert_to_lora
    from veneer.errors import (
        AdapterError,
        BaseMismatchError,
        BaseModelError,
        BindError,
        ConfigError,
        CorruptFileError,
        DuplicateAdapterError,
        IncompleteCheckpointError,
        MergeError,
        NonFiniteError,
        NotACheckpointError,
        PathNotFoundError,
        PickleRefusedError,
        SourceError,
        TargetError,
        UnknownAdapterError,
        UnknownKeyError,
        UnknownKeywordError,
        UnknownMethodError,
        UnsupportedError,
        VeneerError,
    )
    from veneer.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
    from veneer.inspection import Inspection, Problem, inspect
    from veneer.loader import load, load_tokenizer
    from veneer.merging.extract import ExtractReport, extract
    from veneer.merging.folder import merge
    from veneer.merging.quantized import QuantizedMerge
    from veneer.merging.report import MergeReport
    from veneer.merging.undo import UnmergeReport, unmerge
    from veneer.merging.verify import VerifyReport, verify
    from veneer.model import (
        PeftMixedModel,
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
    )
    from veneer.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
    from veneer.report import AdapterReport, LoadReport
    from veneer.start_configs import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
    from veneer.starts.corda import preprocess_corda
    from veneer.starts.eva import get_eva_state_dict, initialize_lora_eva_weights
    from veneer.starts.loftq_packed import replace_lora_weights_loftq
    from veneer.starts.lora_ga import preprocess_loraga
    from veneer.status import TunerLayerStatus, TunerModelStatus
    from veneer.variant_configs import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

# Public name -> the module that defines it.
_HOMES = {
    name: module
    for module, names in {
        "arrow": "create_arrow_model",
        "arrow_config": "ArrowConfig",
        "auto": (
            "AutoModelForCausalLM AutoModelForFeatureExtraction "
            "AutoModelForImageClassification AutoModelForImageTextToText "
            "AutoModelForQuestionAnswering AutoModelForSeq2SeqLM "
            "AutoModelForSequenceClassification AutoModelForSpeechSeq2Seq "
            "AutoModelForTokenClassification AutoPeftModel AutoPeftModelForCausalLM "
            "AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering "
            "AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification "
            "AutoPeftModelForTokenClassification"
        ),
        "benching.result": "BenchReport",
        "benching.run": "bench",
        "config": "PeftConfig PeftType TaskType",
        "configs.adalora": "AdaLoraConfig",
        "configs.adamss": "AdamssConfig",
        "configs.adaption_prompt": "AdaptionPromptConfig",
        "configs.beft": "BeftConfig",
        "configs.boft": "BOFTConfig",
        "configs.bone": "BoneConfig",
        "configs.c3a": "C3AConfig",
        "configs.cartridge": "CartridgeConfig",
        "configs.cpt": "CPTConfig",
        "configs.delora": "DeloraConfig",
        "configs.fourierft": "FourierFTConfig",
        "configs.hira": "HiraConfig",
        "configs.hra": "HRAConfig",
        "configs.ia3": "IA3Config",
        "configs.lily": "LilyConfig",
        "configs.ln_tuning": "LNTuningConfig",
        "configs.loha": "LoHaConfig",
        "configs.lokr": "LoKrConfig",
        "configs.lora": "LoraConfig",
        "configs.miss": "MissConfig",
        "configs.multitask_prompt_tuning": "MultitaskPromptTuningConfig",
        "configs.oft": "OFTConfig",
        "configs.pvera": "PveraConfig",
        "configs.randlora": "RandLoraConfig",
        "configs.vblora": "VBLoRAConfig",
        "configs.unilora": "UniLoraConfig",
        "configs.tinylora": "TinyLoraConfig",
        "configs.p_tuning": "PromptEncoderConfig",
        "configs.poly": "PolyConfig",
        "configs.prefix_tuning": "PrefixTuningConfig",
        "configs.prompt_tuning": "PromptTuningConfig",
        "configs.road": "RoadConfig",
        "configs.shadow": "ShadowConfig",
        "configs.shira": "ShiraConfig",
        "configs.trainable_tokens": "TrainableTokensConfig",
        "configs.glora": "GloraConfig",
        "configs.gralora": "GraloraConfig",
        "configs.psoft": "PsoftConfig",
        "configs.osf": "OSFConfig",
        "configs.peanut": "PeanutConfig",
        "configs.supertuning": "SupertuningConfig",
        "configs.deft": "DeftConfig",
        "configs.frod": "FrodConfig",
        "configs.vera": "VeraConfig",
        "configs.waveft": "WaveFTConfig",
        "configs.xlora": "XLoraConfig",
        "convert": "ConversionReport convert_to_lora",
        "errors": (
            "AdapterError BaseMismatchError BaseModelError BindError ConfigError "
            "CorruptFileError DuplicateAdapterError IncompleteCheckpointError MergeError "
            "NonFiniteError NotACheckpointError PathNotFoundError PickleRefusedError "
            "SourceError TargetError UnknownAdapterError UnknownKeyError UnknownKeywordError "
            "UnknownMethodError UnsupportedError VeneerError"
        ),
        "hotswap": "hotswap_adapter prepare_model_for_compiled_hotswap",
        "inspection": "Inspection Problem inspect",
        "loader": "load load_tokenizer",
        "merging.extract": "ExtractReport extract",
        "merging.folder": "merge",
        "merging.report": "MergeReport",
        "merging.undo": "UnmergeReport unmerge",
        "merging.verify": "VerifyReport verify",
        "merging.quantized": "QuantizedMerge",
        "model": (
            "PeftMixedModel PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction "
            "PeftModelForQuestionAnswering PeftModelForSeq2SeqLM "
            "PeftModelForSequenceClassification PeftModelForTokenClassification "
            "get_peft_model"
        ),
        "optimizers": "create_lorafa_optimizer create_loraplus_optimizer",
        "report": "AdapterReport LoadReport",
        "start_configs": "CordaConfig EvaConfig LoftQConfig LoraGAConfig",
        "variant_configs": "BdLoraConfig KasaConfig MontecloraConfig VeloraConfig",
        "starts.corda": "preprocess_corda",
        "starts.eva": "get_eva_state_dict initialize_lora_eva_weights",
        "starts.loftq_packed": "replace_lora_weights_loftq",
        "starts.lora_ga": "preprocess_loraga",
        "status": "TunerLayerStatus TunerModelStatus",
    }.items()
    for name in names.split()
}

__all__ = [
    "AdaLoraConfig",
    "AdamssConfig",
    "AdapterError",
    "AdapterReport",
    "AdaptionPromptConfig",
    "ArrowConfig",
    "AutoModelForCausalLM",
    "AutoModelForFeatureExtraction",
    "AutoModelForImageClassification",
    "AutoModelForImageTextToText",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForTokenClassification",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "BaseMismatchError",
    "BaseModelError",
    "BdLoraConfig",
    "BeftConfig",
    "BenchReport",
    "BindError",
    "BoneConfig",
    "C3AConfig",
    "CPTConfig",
    "CartridgeConfig",
    "ConfigError",
    "ConversionReport",
    "CordaConfig",
    "CorruptFileError",
    "DeftConfig",
    "DeloraConfig",
    "DuplicateAdapterError",
    "EvaConfig",
    "ExtractReport",
    "FourierFTConfig",
    "FrodConfig",
    "GloraConfig",
    "GraloraConfig",
    "HRAConfig",
    "HiraConfig",
    "IA3Config",
    "IncompleteCheckpointError",
    "Inspection",
    "KasaConfig",
    "LNTuningConfig",
    "LilyConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoadReport",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "MergeError",
    "MergeReport",
    "MissConfig",
    "MontecloraConfig",
    "MultitaskPromptTuningConfig",
    "NonFiniteError",
    "NotACheckpointError",
    "OFTConfig",
    "OSFConfig",
    "PathNotFoundError",
    "PeanutConfig",
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PickleRefusedError",
    "PolyConfig",
    "PrefixTuningConfig",
    "Problem",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "PsoftConfig",
    "PveraConfig",
    "QuantizedMerge",
    "RandLoraConfig",
    "RoadConfig",
    "ShadowConfig",
    "ShiraConfig",
    "SourceError",
    "SupertuningConfig",
    "TargetError",
    "TaskType",
    "TinyLoraConfig",
    "TrainableTokensConfig",
    "TunerLayerStatus",
    "TunerModelStatus",
    "UniLoraConfig",
    "UnknownAdapterError",
    "UnknownKeyError",
    "UnknownKeywordError",
    "UnknownMethodError",
    "UnmergeReport",
    "UnsupportedError",
    "VBLoRAConfig",
    "VeloraConfig",
    "VeneerError",
    "VeraConfig",
    "VerifyReport",
    "WaveFTConfig",
    "XLoraConfig",
    "__version__",
    "bench",
    "convert_to_lora",
    "create_arrow_model",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "extract",
    "get_eva_state_dict",
    "get_peft_model",
    "hotswap_adapter",
    "initialize_lora_eva_weights",
    "inspect",
    "load",
    "load_tokenizer",
    "merge",
    "prepare_model_for_compiled_hotswap",
    "preprocess_corda",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"veneer.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
