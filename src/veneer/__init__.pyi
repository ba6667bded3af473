"""The public names, and where each lives: read by type checkers, and by :mod:`veneer` itself at run time."""

from veneer._version import __version__ as __version__
from veneer.adapters.bank import AdapterBank as AdapterBank
from veneer.adapters.bank_plan import BankedAdapter as BankedAdapter
from veneer.adapters.bank_plan import BankLease as BankLease
from veneer.adapters.bank_plan import BankPlan as BankPlan
from veneer.adapters.bank_plan import BankStatus as BankStatus
from veneer.adapters.merge.kept_copies import (
    KeptAdapterReport as KeptAdapterReport,
)
from veneer.adapters.merge.kept_copies import (
    MergedCopiesReport as MergedCopiesReport,
)
from veneer.adapters.status import (
    TunerLayerStatus as TunerLayerStatus,
)
from veneer.adapters.status import (
    TunerModelStatus as TunerModelStatus,
)
from veneer.benching.bench_report import BenchReport as BenchReport
from veneer.benching.run import bench as bench
from veneer.checkpoints.inspection.facts import Problem as Problem
from veneer.checkpoints.inspection.inspect_path import (
    Inspection as Inspection,
)
from veneer.checkpoints.inspection.inspect_path import (
    inspect as inspect,
)
from veneer.checkpoints.serving import (
    ServingReport as ServingReport,
)
from veneer.checkpoints.serving import (
    check_serving as check_serving,
)
from veneer.configs.arrow_options import ArrowConfig as ArrowConfig
from veneer.configs.base import PeftConfig as PeftConfig
from veneer.configs.lora_start_options import (
    CordaConfig as CordaConfig,
)
from veneer.configs.lora_start_options import (
    EvaConfig as EvaConfig,
)
from veneer.configs.lora_start_options import (
    LoftQConfig as LoftQConfig,
)
from veneer.configs.lora_start_options import (
    LoraGAConfig as LoraGAConfig,
)
from veneer.configs.lora_variant_options import (
    BdLoraConfig as BdLoraConfig,
)
from veneer.configs.lora_variant_options import (
    KasaConfig as KasaConfig,
)
from veneer.configs.lora_variant_options import (
    MontecloraConfig as MontecloraConfig,
)
from veneer.configs.lora_variant_options import (
    VeloraConfig as VeloraConfig,
)
from veneer.configs.methods.adalora import AdaLoraConfig as AdaLoraConfig
from veneer.configs.methods.adamss import AdamssConfig as AdamssConfig
from veneer.configs.methods.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
from veneer.configs.methods.beft import BeftConfig as BeftConfig
from veneer.configs.methods.boft import BOFTConfig as BOFTConfig
from veneer.configs.methods.bone import BoneConfig as BoneConfig
from veneer.configs.methods.c3a import C3AConfig as C3AConfig
from veneer.configs.methods.cartridge import CartridgeConfig as CartridgeConfig
from veneer.configs.methods.cpt import CPTConfig as CPTConfig
from veneer.configs.methods.deft import DeftConfig as DeftConfig
from veneer.configs.methods.delora import DeloraConfig as DeloraConfig
from veneer.configs.methods.fourierft import FourierFTConfig as FourierFTConfig
from veneer.configs.methods.frod import FrodConfig as FrodConfig
from veneer.configs.methods.glora import GloraConfig as GloraConfig
from veneer.configs.methods.gralora import GraloraConfig as GraloraConfig
from veneer.configs.methods.hira import HiraConfig as HiraConfig
from veneer.configs.methods.hra import HRAConfig as HRAConfig
from veneer.configs.methods.ia3 import IA3Config as IA3Config
from veneer.configs.methods.lily import LilyConfig as LilyConfig
from veneer.configs.methods.ln_tuning import LNTuningConfig as LNTuningConfig
from veneer.configs.methods.loha import LoHaConfig as LoHaConfig
from veneer.configs.methods.lokr import LoKrConfig as LoKrConfig
from veneer.configs.methods.lora import LoraConfig as LoraConfig
from veneer.configs.methods.lora import LoraRuntimeConfig as LoraRuntimeConfig
from veneer.configs.methods.miss import MissConfig as MissConfig
from veneer.configs.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
from veneer.configs.methods.oft import OFTConfig as OFTConfig
from veneer.configs.methods.osf import OSFConfig as OSFConfig
from veneer.configs.methods.p_tuning import PromptEncoderConfig as PromptEncoderConfig
from veneer.configs.methods.peanut import PeanutConfig as PeanutConfig
from veneer.configs.methods.poly import PolyConfig as PolyConfig
from veneer.configs.methods.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
from veneer.configs.methods.prompt_tuning import PromptTuningConfig as PromptTuningConfig
from veneer.configs.methods.psoft import PsoftConfig as PsoftConfig
from veneer.configs.methods.pvera import PveraConfig as PveraConfig
from veneer.configs.methods.randlora import RandLoraConfig as RandLoraConfig
from veneer.configs.methods.road import RoadConfig as RoadConfig
from veneer.configs.methods.shadow import ShadowConfig as ShadowConfig
from veneer.configs.methods.shira import ShiraConfig as ShiraConfig
from veneer.configs.methods.supertuning import SupertuningConfig as SupertuningConfig
from veneer.configs.methods.tinylora import TinyLoraConfig as TinyLoraConfig
from veneer.configs.methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
from veneer.configs.methods.unilora import UniLoraConfig as UniLoraConfig
from veneer.configs.methods.vblora import VBLoRAConfig as VBLoRAConfig
from veneer.configs.methods.vera import VeraConfig as VeraConfig
from veneer.configs.methods.waveft import WaveFTConfig as WaveFTConfig
from veneer.configs.methods.xlora import XLoraConfig as XLoraConfig
from veneer.configs.names import (
    MultitaskPromptTuningInit as MultitaskPromptTuningInit,
)
from veneer.configs.names import (
    PeftType as PeftType,
)
from veneer.configs.names import (
    PromptEncoderReparameterizationType as PromptEncoderReparameterizationType,
)
from veneer.configs.names import (
    PromptTuningInit as PromptTuningInit,
)
from veneer.configs.names import (
    TaskType as TaskType,
)
from veneer.configs.type_mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING,
)
from veneer.configs.type_mapping import (
    get_peft_config as get_peft_config,
)
from veneer.errors import (
    AdapterError as AdapterError,
)
from veneer.errors import (
    BankFullError as BankFullError,
)
from veneer.errors import (
    BaseMismatchError as BaseMismatchError,
)
from veneer.errors import (
    BaseModelError as BaseModelError,
)
from veneer.errors import (
    BindError as BindError,
)
from veneer.errors import (
    ConfigError as ConfigError,
)
from veneer.errors import (
    ConfigTypeError as ConfigTypeError,
)
from veneer.errors import (
    CorruptFileError as CorruptFileError,
)
from veneer.errors import (
    DuplicateAdapterError as DuplicateAdapterError,
)
from veneer.errors import (
    EngineError as EngineError,
)
from veneer.errors import (
    IncompleteCheckpointError as IncompleteCheckpointError,
)
from veneer.errors import (
    MergeError as MergeError,
)
from veneer.errors import (
    MixedBatchError as MixedBatchError,
)
from veneer.errors import (
    NoAdaptersError as NoAdaptersError,
)
from veneer.errors import (
    NoMergedFormError as NoMergedFormError,
)
from veneer.errors import (
    NonFiniteError as NonFiniteError,
)
from veneer.errors import (
    NotACheckpointError as NotACheckpointError,
)
from veneer.errors import (
    NotConvertibleError as NotConvertibleError,
)
from veneer.errors import (
    OutputError as OutputError,
)
from veneer.errors import (
    PathNotFoundError as PathNotFoundError,
)
from veneer.errors import (
    PickleRefusedError as PickleRefusedError,
)
from veneer.errors import (
    SourceError as SourceError,
)
from veneer.errors import (
    StateMismatchError as StateMismatchError,
)
from veneer.errors import (
    TargetError as TargetError,
)
from veneer.errors import (
    UnknownAdapterError as UnknownAdapterError,
)
from veneer.errors import (
    UnknownKeyError as UnknownKeyError,
)
from veneer.errors import (
    UnknownKeywordError as UnknownKeywordError,
)
from veneer.errors import (
    UnknownMethodError as UnknownMethodError,
)
from veneer.errors import (
    UnsupportedError as UnsupportedError,
)
from veneer.errors import (
    UsageError as UsageError,
)
from veneer.errors import (
    VeneerError as VeneerError,
)
from veneer.finetuning.supervised import train as train
from veneer.finetuning.train_report import TrainReport as TrainReport
from veneer.layers.quantized_merge import QuantizedMerge as QuantizedMerge
from veneer.merging.combine_folders import (
    CombineReport as CombineReport,
)
from veneer.merging.combine_folders import (
    combine as combine,
)
from veneer.merging.compose_cartridges import (
    compose_cartridge_adapters as compose_cartridge_adapters,
)
from veneer.merging.extract_lora import (
    ExtractReport as ExtractReport,
)
from veneer.merging.extract_lora import (
    extract as extract,
)
from veneer.merging.merge_folder import merge as merge
from veneer.merging.output.merge_report import MergeReport as MergeReport
from veneer.merging.output.unmerge import (
    UnmergeReport as UnmergeReport,
)
from veneer.merging.output.unmerge import (
    unmerge as unmerge,
)
from veneer.merging.verify import (
    VerifyReport as VerifyReport,
)
from veneer.merging.verify import (
    verify as verify,
)
from veneer.methods.lora_starts.corda import preprocess_corda as preprocess_corda
from veneer.methods.lora_starts.lora_ga import preprocess_loraga as preprocess_loraga
from veneer.peft_model.arrow_model import create_arrow_model as create_arrow_model
from veneer.peft_model.auto_classes import (
    AutoModelForCausalLM as AutoModelForCausalLM,
)
from veneer.peft_model.auto_classes import (
    AutoModelForFeatureExtraction as AutoModelForFeatureExtraction,
)
from veneer.peft_model.auto_classes import (
    AutoModelForImageClassification as AutoModelForImageClassification,
)
from veneer.peft_model.auto_classes import (
    AutoModelForImageTextToText as AutoModelForImageTextToText,
)
from veneer.peft_model.auto_classes import (
    AutoModelForQuestionAnswering as AutoModelForQuestionAnswering,
)
from veneer.peft_model.auto_classes import (
    AutoModelForSeq2SeqLM as AutoModelForSeq2SeqLM,
)
from veneer.peft_model.auto_classes import (
    AutoModelForSequenceClassification as AutoModelForSequenceClassification,
)
from veneer.peft_model.auto_classes import (
    AutoModelForSpeechSeq2Seq as AutoModelForSpeechSeq2Seq,
)
from veneer.peft_model.auto_classes import (
    AutoModelForTokenClassification as AutoModelForTokenClassification,
)
from veneer.peft_model.auto_classes import (
    AutoPeftModel as AutoPeftModel,
)
from veneer.peft_model.auto_classes import (
    AutoPeftModelForCausalLM as AutoPeftModelForCausalLM,
)
from veneer.peft_model.auto_classes import (
    AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction,
)
from veneer.peft_model.auto_classes import (
    AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering,
)
from veneer.peft_model.auto_classes import (
    AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM,
)
from veneer.peft_model.auto_classes import (
    AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
)
from veneer.peft_model.auto_classes import (
    AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification,
)
from veneer.peft_model.base_state import (
    get_base_model_state_dict as get_base_model_state_dict,
)
from veneer.peft_model.base_state import (
    set_base_model_state_dict as set_base_model_state_dict,
)
from veneer.peft_model.conversion_report import ConversionReport as ConversionReport
from veneer.peft_model.convert import convert as convert
from veneer.peft_model.convert_to_lora import (
    convert_to_lora as convert_to_lora,
)
from veneer.peft_model.convert_to_lora import (
    save_as_lora as save_as_lora,
)
from veneer.peft_model.hotswap import (
    hotswap_adapter as hotswap_adapter,
)
from veneer.peft_model.hotswap import (
    prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap,
)
from veneer.peft_model.inject import (
    inject_adapter_in_model as inject_adapter_in_model,
)
from veneer.peft_model.load import load as load
from veneer.peft_model.load_report import (
    AdapterReport as AdapterReport,
)
from veneer.peft_model.load_report import (
    LoadReport as LoadReport,
)
from veneer.peft_model.peft_model import (
    PeftMixedModel as PeftMixedModel,
)
from veneer.peft_model.peft_model import (
    PeftModel as PeftModel,
)
from veneer.peft_model.peft_model import (
    PeftModelForCausalLM as PeftModelForCausalLM,
)
from veneer.peft_model.peft_model import (
    PeftModelForFeatureExtraction as PeftModelForFeatureExtraction,
)
from veneer.peft_model.peft_model import (
    PeftModelForQuestionAnswering as PeftModelForQuestionAnswering,
)
from veneer.peft_model.peft_model import (
    PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM,
)
from veneer.peft_model.peft_model import (
    PeftModelForSequenceClassification as PeftModelForSequenceClassification,
)
from veneer.peft_model.peft_model import (
    PeftModelForTokenClassification as PeftModelForTokenClassification,
)
from veneer.peft_model.peft_model import (
    get_peft_model as get_peft_model,
)
from veneer.peft_model.state_dict import (
    get_peft_model_state_dict as get_peft_model_state_dict,
)
from veneer.peft_model.state_dict import (
    load_peft_weights as load_peft_weights,
)
from veneer.peft_model.state_dict import (
    set_peft_model_state_dict as set_peft_model_state_dict,
)
from veneer.peft_model.status import (
    get_layer_status as get_layer_status,
)
from veneer.peft_model.status import (
    get_model_status as get_model_status,
)
from veneer.peft_model.tokenizer import load_tokenizer as load_tokenizer
from veneer.printing import VeneerWarning as VeneerWarning
from veneer.training.eva import (
    get_eva_state_dict as get_eva_state_dict,
)
from veneer.training.eva import (
    initialize_lora_eva_weights as initialize_lora_eva_weights,
)
from veneer.training.kappa_targets import (
    find_kappa_target_modules as find_kappa_target_modules,
)
from veneer.training.kv_prefix import (
    initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values,
)
from veneer.training.kv_prefix import (
    initialize_kv_prefix_from_text as initialize_kv_prefix_from_text,
)
from veneer.training.kv_prefix import (
    prompt_embeddings_from_past_key_values as prompt_embeddings_from_past_key_values,
)
from veneer.training.loftq_on_quantized import replace_lora_weights_loftq as replace_lora_weights_loftq
from veneer.training.optimizers import (
    create_lorafa_optimizer as create_lorafa_optimizer,
)
from veneer.training.optimizers import (
    create_loraplus_optimizer as create_loraplus_optimizer,
)
from veneer.training.precision import (
    cast_mixed_precision_params as cast_mixed_precision_params,
)
from veneer.training.precision import (
    prepare_model_for_kbit_training as prepare_model_for_kbit_training,
)
