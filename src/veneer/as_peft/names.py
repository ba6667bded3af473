"""Lists the modules of peft that Veneer stands in for, and where each of their names lives in Veneer.

Internals that nobody but peft's own code uses are left out; what third parties import, as far as it was found in the
sources of the libraries around transformers, is here. ``docs/from-peft.md`` says what that is.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PACKAGE = "peft"

# The version of peft whose names, signatures and behaviour are offered, and which its metadata tells.
PEFT_VERSION = "0.21.2"


@dataclass(frozen=True)
class Home:
    """The place of a name in Veneer."""

    module: str
    name: str

    def fetch(self) -> Any:
        """Return the object that the name stands for."""
        return getattr(importlib.import_module(self.module), self.name)


_CLASSES = "veneer.as_peft.classes"
_FUNCTIONS = "veneer.as_peft.functions"
_TARGETS = "veneer.as_peft.targets"

# Method's package in peft.tuners -> the beginning of the names of its classes there.
METHOD_STEMS = {
    **{"adalora": "AdaLora", "adamss": "Adamss", "adaption_prompt": "AdaptionPrompt", "beft": "Beft", "boft": "BOFT"},
    **{"c3a": "C3A", "deft": "Deft", "delora": "Delora", "fourierft": "FourierFT", "frod": "Frod", "glora": "Glora"},
    **{"gralora": "Gralora", "hira": "Hira", "hra": "HRA", "ia3": "IA3", "lily": "Lily", "ln_tuning": "LNTuning"},
    **{"loha": "LoHa", "lokr": "LoKr", "lora": "Lora", "miss": "Miss", "oft": "OFT", "osf": "OSF", "peanut": "Peanut"},
    **{"poly": "Poly", "psoft": "Psoft", "pvera": "Pvera", "randlora": "RandLora", "road": "Road", "shadow": "Shadow"},
    **{"shira": "Shira", "supertuning": "Supertuning", "tinylora": "TinyLora", "trainable_tokens": "TrainableTokens"},
    **{"unilora": "UniLora", "vblora": "VBLoRA", "vera": "Vera", "waveft": "WaveFT", "xlora": "XLora"},
}

# Package of a prompt's method -> the beginning of its config's name, and the name of its encoder.
PROMPT_CLASSES = {
    "cartridge": ("Cartridge", "CartridgeEncoder"),
    "cpt": ("CPT", "CPTEmbedding"),
    "multitask_prompt_tuning": ("MultitaskPromptTuning", "MultitaskPromptEmbedding"),
    "p_tuning": ("PromptEncoder", "PromptEncoder"),
    "prefix_tuning": ("PrefixTuning", "PrefixEncoder"),
    "prompt_tuning": ("PromptTuning", "PromptEmbedding"),
}


def _at(module: str, names: str) -> dict[str, Home]:
    return {name: Home(module, name) for name in names.split()}


def _public(names: Iterable[str]) -> dict[str, Home]:
    return {name: Home("veneer", name) for name in names}


def _mapping_names() -> str:
    """Return the names of the constants of the layers that each method adapts in each type of model."""
    methods = [package.upper().replace("LN_TUNING", "LNTUNING") for package in METHOD_STEMS]
    mappings = [f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING" for method in methods]
    return " ".join([*mappings, "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"])


def _method_modules() -> dict[str, dict[str, Home]]:
    """Return ``peft.tuners.<method>``, and its modules ``config``, ``model`` and ``layer``, for each method."""
    modules: dict[str, dict[str, Home]] = {}
    for package, stem in METHOD_STEMS.items():
        parts = {
            "config": _public([f"{stem}Config"]),
            "model": {**_at(_CLASSES, f"{stem}Model"), **_mapping_of(package)},
            "layer": _at(_CLASSES, f"{stem}Layer"),
        }
        modules.update(_package(f"peft.tuners.{package}", parts))
    for package, (stem, encoder) in PROMPT_CLASSES.items():
        parts = {"config": _public([f"{stem}Config"]), "model": _at(_CLASSES, encoder)}
        modules.update(_package(f"peft.tuners.{package}", parts))
    return modules


def _mapping_of(package: str) -> dict[str, Home]:
    return {name: home for name, home in _at(_TARGETS, _mapping_names()).items() if f"_{package.upper()}_T" in name}


def _package(name: str, parts: dict[str, dict[str, Home]]) -> dict[str, dict[str, Home]]:
    """Return a package that has the names of its modules, and the modules."""
    whole = {key: home for part in parts.values() for key, home in part.items() if not key.startswith("TRANSF")}
    return {name: whole, **{f"{name}.{part}": homes for part, homes in parts.items()}}


def _modules() -> dict[str, dict[str, Home]]:
    modules = _method_modules()
    for name, homes in _OTHERS.items():
        modules[name] = {**modules.get(name, {}), **homes}
    modules["peft.tuners.lora"].update(modules["peft.tuners.lora.layer"])
    tuners = modules["peft.tuners"]
    for package in (*METHOD_STEMS, *PROMPT_CLASSES):
        tuners.update(modules[f"peft.tuners.{package}"])
    configs = [f"{stem}Config" for stem in (*METHOD_STEMS.values(), *(stem for stem, _ in PROMPT_CLASSES.values()))]
    classes = [f"{stem}Model" for stem in METHOD_STEMS.values()] + [encoder for _, encoder in PROMPT_CLASSES.values()]
    modules["peft"] = {**_public(configs), **_at(_CLASSES, " ".join(classes)), **_OTHERS["peft"]}
    # The one encoder that peft keeps to its module.
    del modules["peft"]["MultitaskPromptEmbedding"]
    return modules


# The public names that are Veneer's too, beside the configs of the methods.
_SHARED = (
    "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering "
    "AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification ArrowConfig "
    "BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig MontecloraConfig VeloraConfig PeftConfig "
    "PeftMixedModel PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering "
    "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification PeftType TaskType "
    "PEFT_TYPE_TO_CONFIG_MAPPING cast_mixed_precision_params convert_to_lora create_arrow_model get_eva_state_dict "
    "MultitaskPromptTuningInit PromptEncoderReparameterizationType PromptTuningInit compose_cartridge_adapters "
    "find_kappa_target_modules get_base_model_state_dict initialize_kv_prefix_from_past_key_values "
    "initialize_kv_prefix_from_text prompt_embeddings_from_past_key_values set_base_model_state_dict "
    "get_layer_status get_model_status get_peft_config get_peft_model get_peft_model_state_dict "
    "initialize_lora_eva_weights inject_adapter_in_model load_peft_weights prepare_model_for_kbit_training "
    "LoraRuntimeConfig preprocess_loraga replace_lora_weights_loftq save_as_lora set_peft_model_state_dict"
)

_LORA_CONFIGS = (
    "ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig MontecloraConfig "
    "LoraRuntimeConfig VeloraConfig"
)
_LORA_FUNCTIONS = (
    "convert_to_lora create_arrow_model get_eva_state_dict initialize_lora_eva_weights preprocess_loraga save_as_lora"
)
_CONSTANTS = (
    "DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND "
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION SEQ_CLS_HEAD_NAMES"
)
_LORA_LAYERS = "Conv1d Conv2d Conv3d Embedding Linear MultiheadAttention ParamWrapper"
_TYPES = _public(["PeftType", "TaskType"])
_STATE = _public(["get_peft_model_state_dict", "set_peft_model_state_dict", "load_peft_weights"])
_DETACHED_SHADOW = _at("veneer.adapters.detached_shadow", "DetachedShadowModel")
_WRAPPERS = _at(_CLASSES, "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper")

_ERRORS = {
    "NoMatchingPeftModuleError": Home("veneer", "TargetError"),
    "PeftError": Home("veneer", "VeneerError"),
    "PeftWarning": Home("veneer", "VeneerWarning"),
}
_PROMPT_CONFIG = {"PromptLearningConfig": Home("veneer.configs.base", "PromptConfig")}

_OTHERS: dict[str, dict[str, Home]] = {
    "peft": {
        **_public(_SHARED.split()),
        **_ERRORS,
        **_PROMPT_CONFIG,
        **_at(_FUNCTIONS, "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING shift_tokens_right"),
        **_at(_FUNCTIONS, "bloom_model_postprocess_past_key_value"),
        **_at(_CLASSES, "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING"),
    },
    "peft.auto": _public(
        f"AutoPeftModel{task}"
        for task in (
            *("", "ForCausalLM", "ForSeq2SeqLM", "ForSequenceClassification", "ForTokenClassification"),
            *("ForQuestionAnswering", "ForFeatureExtraction"),
        )
    ),
    "peft.config": {
        **_TYPES,
        **_public(["PeftConfig"]),
        **_PROMPT_CONFIG,
        **_at(_FUNCTIONS, "CONFIG_NAME"),
        "PeftConfigMixin": Home("veneer", "PeftConfig"),
    },
    "peft.functional": {
        **_at(_FUNCTIONS, "cast_adapter_dtype delete_adapter set_adapter set_requires_grad"),
        **_public(["get_peft_model_state_dict", "inject_adapter_in_model", "set_peft_model_state_dict"]),
    },
    "peft.helpers": {
        **_at(_FUNCTIONS, "DoraCaching check_if_peft_model disable_input_dtype_casting rescale_adapter_scale"),
        **_at(_FUNCTIONS, "update_forward_signature update_generate_signature update_signature"),
        **_at("veneer.training.kappa_targets", "KappaTuneSelector find_kappa_target_modules"),
    },
    "peft.mapping": {
        **_public(["PEFT_TYPE_TO_CONFIG_MAPPING", "get_peft_config", "inject_adapter_in_model"]),
        **_at("veneer.configs.type_mapping", "PEFT_TYPE_TO_PREFIX_MAPPING"),
        **_at(_CLASSES, "PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING"),
    },
    "peft.mapping_func": _public(["get_peft_model"]),
    "peft.mixed_model": _public(["PeftMixedModel"]),
    "peft.peft_model": _public(
        [
            *("PeftModel", "PeftModelForCausalLM", "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification"),
            *("PeftModelForTokenClassification", "PeftModelForQuestionAnswering", "PeftModelForFeatureExtraction"),
            *("get_layer_status", "get_model_status"),
        ]
    ),
    "peft.optimizers": {
        **_public(["create_lorafa_optimizer", "create_loraplus_optimizer"]),
        **_at("veneer.training.riemannian", "create_riemannian_optimizer"),
    },
    "peft.import_utils": _at(
        "veneer.as_peft.import_checks",
        "is_aqlm_available is_bnb_4bit_available is_bnb_available is_diffusers_available is_eetq_available "
        "is_gptqmodel_available is_hqq_available is_inc_available is_optimum_available is_quanto_available "
        "is_te_available is_torch_tpu_available is_torchao_available is_torchao_ge_v0_18_0 is_transformers_ge_v5 "
        "is_transformers_ge_v5_13_0 is_transformers_ge_v5_17_0 is_transformers_ge_v5_1_0 is_transformers_ge_v5_4_0 "
        "is_transformers_ge_v5_6_0 is_transformers_le_4_53 is_xpu_available",
    ),
    "peft.tuners": {},
    "peft.tuners._buffer_dict": _at(_CLASSES, "BufferDict"),
    "peft.tuners.multitask_prompt_tuning": _public(["MultitaskPromptTuningInit"]),
    "peft.tuners.multitask_prompt_tuning.config": _public(["MultitaskPromptTuningInit"]),
    "peft.tuners.p_tuning": _public(["PromptEncoderReparameterizationType"]),
    "peft.tuners.prompt_tuning": _public(["PromptTuningInit"]),
    "peft.tuners.prompt_tuning.config": _public(["PromptTuningInit"]),
    "peft.tuners.shadow": _DETACHED_SHADOW,
    "peft.tuners.shadow.layers": {**_DETACHED_SHADOW, **_at(_CLASSES, "ShadowLayer")},
    "peft.tuners.shadow.diffusion_models": {
        "DetachedFluxShadowModel": Home("veneer.methods.shared.shadow_denoiser", "Flux2Backbone")
    },
    "peft.tuners.lora.config": _public(_LORA_CONFIGS.split()),
    "peft.tuners.lora": {
        **_public([*_LORA_CONFIGS.split(), *_LORA_FUNCTIONS.split()]),
        **_at(_CLASSES, "Linear4bit Linear8bitLt"),
    },
    "peft.tuners.lora.arrow": _public(["ArrowConfig", "create_arrow_model"]),
    "peft.tuners.lora.conversion": _public(["convert_to_lora", "save_as_lora"]),
    "peft.tuners.lora.corda": _public(["preprocess_corda"]),
    "peft.tuners.lora.eva": _public(["get_eva_state_dict", "initialize_lora_eva_weights"]),
    "peft.tuners.lora.intruders": _at("veneer.training.intruders", "reduce_intruder_dimension"),
    "peft.tuners.lora.loraga": _public(["preprocess_loraga"]),
    "peft.tuners.lora.layer": {
        **_at(_CLASSES, f"{_LORA_LAYERS} LoraLayer"),
        **_at(_FUNCTIONS, "check_adapters_to_merge"),
    },
    "peft.tuners.lora.torchao": _at(_CLASSES, "TorchaoLoraLinear"),
    "peft.tuners.lora.tp_layer": _at(_CLASSES, "LoraParallelLinear"),
    "peft.tuners.lora.bnb": _at(_CLASSES, "Linear4bit Linear8bitLt"),
    "peft.tuners.tuners_utils": {
        **_at(_CLASSES, "BaseTunerLayer"),
        **_at(_CLASSES, "BaseTuner"),
        **_at(_TARGETS, "_maybe_include_all_linear_layers check_target_module_exists inspect_matched_modules"),
        **_at(_FUNCTIONS, "check_adapters_to_merge delete_adapter onload_layer set_adapter set_requires_grad"),
    },
    "peft.utils.constants": {
        **_at(_FUNCTIONS, "CONFIG_NAME SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME"),
        **_at(_TARGETS, f"{_CONSTANTS} {_mapping_names()}"),
    },
    "peft.tuners.lokr.layer": _at("veneer.methods.lokr", "factorization"),
    "peft.utils.hotswap": {
        **_public(["hotswap_adapter", "prepare_model_for_compiled_hotswap"]),
        **_at("veneer.peft_model.hotswap", "check_hotswap_configs_compatible hotswap_adapter_from_state_dict"),
    },
    "peft.utils.other": {
        **_WRAPPERS,
        **_public(["cast_mixed_precision_params", "prepare_model_for_kbit_training"]),
        **_at(_FUNCTIONS, "CONFIG_NAME SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME"),
        **_at(_FUNCTIONS, "_get_submodules fsdp_auto_wrap_policy get_pattern_key infer_device transpose"),
        **_at(_FUNCTIONS, "check_file_exists_on_hf_hub get_quantization_config"),
        **_at(_TARGETS, "EMBEDDING_LAYER_NAMES"),
    },
    "peft.utils.error": {name: home for name, home in _ERRORS.items() if name != "PeftWarning"},
    "peft.utils.peft_types": _TYPES,
    "peft.utils.warning": {"PeftWarning": _ERRORS["PeftWarning"]},
    "peft.utils.save_and_load": {
        **_STATE,
        **_at(_FUNCTIONS, "get_embedding_layer_name has_valid_embedding_base_layer"),
    },
    "peft.utils.transformers_weight_conversion": {
        **_at("veneer.as_peft.weight_mapping", "build_peft_weight_mapping"),
        **_at("veneer.base_model.transformers_internals", "get_model_conversion_mapping"),
        **_at(_FUNCTIONS, "convert_peft_config_for_transformers"),
    },
    "peft.utils.integrations": _at(
        _FUNCTIONS, "dequantize_module_weight gather_params_ctx get_bnb_param_type init_empty_weights"
    ),
    "peft.utils": {
        **_TYPES,
        **_STATE,
        **_WRAPPERS,
        **_public(["cast_mixed_precision_params", "prepare_model_for_kbit_training", "replace_lora_weights_loftq"]),
        **_at(_FUNCTIONS, "CONFIG_NAME SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME"),
        **_at(_FUNCTIONS, "_get_submodules bloom_model_postprocess_past_key_value infer_device shift_tokens_right"),
        **_at(_FUNCTIONS, "get_quantization_config transpose"),
        **_at(_TARGETS, f"INCLUDE_LINEAR_LAYERS_SHORTHAND {_mapping_names()}"),
        **_public(["get_base_model_state_dict", "set_base_model_state_dict"]),
    },
}

# Module -> its names -> their places.
MODULES = _modules()
