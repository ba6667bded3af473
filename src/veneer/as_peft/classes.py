"""The classes of peft's layers and tuners, which say by ``isinstance`` what an object of Veneer's is.

Veneer has one class of layers for all methods, and one tuner. What peft's classes are asked is answered from the
adapters that the object carries: a layer is a ``LoraLayer`` while a LoRA is on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from veneer.as_peft.names import METHOD_STEMS, PROMPT_CLASSES
from veneer.as_peft.prompt_encoders import made_alone
from veneer.configs.base import config_class
from veneer.configs.names import PeftType
from veneer.errors import UnsupportedError
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.layers.base_tuner_layer import BaseTunerLayer
from veneer.layers.module_copies import ModuleCopies
from veneer.layers.parameter_holder import ParameterHolder
from veneer.layers.parameter_layer import AdaptedParameter
from veneer.layers.token_adapter import TokenAdapter
from veneer.methods import method_of
from veneer.methods.base import prompt_method
from veneer.peft_model.peft_model import PeftModel, get_peft_model
from veneer.peft_model.tuner import Tuner


class AnsweredByState(type):
    """The class of classes whose instances are objects of Veneer's that are in a certain state."""

    answers: Callable[[Any], bool]
    methods: tuple[str, ...]

    @property
    def adapter_layer_names(cls) -> tuple[str, ...]:
        """The names of the modules that hold an adapter's tensors at a layer."""
        leaves = [leaf for name in cls.methods for leaf in method_of(config_class(name, cls.__name__)()).leaves]
        return tuple(dict.fromkeys(leaf.memory_name.partition(".")[0] for leaf in leaves))

    def __instancecheck__(cls, instance: Any) -> bool:
        return cls.answers(instance)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse, for such objects are made by the functions that adapt a model."""
        raise UnsupportedError(
            f"{cls.__name__} cannot be made by itself here: Veneer has one class for the layers of all methods.",
            hint="Use get_peft_model(model, config) or inject_adapter_in_model(config, model).",
        )


class TunerClass(AnsweredByState):
    """The class of the classes of tuners: calling one puts a new adapter on a model."""

    def __call__(cls, model: nn.Module, config: Any, adapter_name: str = "default", **kwargs: Any) -> Tuner:
        """Put a new adapter on a model, and return the tuner."""
        config = config[adapter_name] if isinstance(config, dict) else config
        peft_model = get_peft_model(model, config, adapter_name, **kwargs)
        # The tuner is all that the caller holds of the PeftModel.
        vars(peft_model.base_model)["kept"] = peft_model
        return peft_model.base_model


class PromptClass(AnsweredByState):
    """The class of the classes of virtual tokens."""

    def __call__(cls, config: Any, word_embeddings: nn.Module | None = None) -> prompt_method.PromptEncoder:
        """Return new virtual tokens, which belong to no model."""
        return made_alone(cls.__name__, config, word_embeddings)


def _class(
    name: str, answers: Callable[[Any], bool], *bases: type, kind: type = AnsweredByState, **attributes: Any
) -> Any:
    own = {"answers": staticmethod(answers), "__module__": __name__, "__doc__": f"peft's {name}."}
    return kind(name, bases, {**own, **attributes})


def _carries(methods: tuple[str, ...]) -> Callable[[Any], bool]:
    return lambda layer: isinstance(layer, AdaptedLayer) and not {*layer.peft_types.values()}.isdisjoint(methods)


def _makes_tokens(method: str) -> Callable[[Any], bool]:
    return lambda module: isinstance(module, prompt_method.PromptEncoder) and module.peft_type == method


def _is_tuner(methods: tuple[str, ...]) -> Callable[[Any], bool]:
    return lambda tuner: isinstance(tuner, Tuner) and str(tuner.peft_type) in methods


def _lora_on(name: str, *kinds: str) -> Any:
    """Return the class of LoRA layers on base layers of the kinds with these names."""

    def answers(layer: Any) -> bool:
        return isinstance(layer, LoraLayer) and any(k.__name__ in kinds for k in type(layer.get_base_layer()).__mro__)

    return _class(name, answers, LoraLayer)


BaseTuner = Tuner
AuxiliaryTrainingWrapper = _class("AuxiliaryTrainingWrapper", lambda module: isinstance(module, ModuleCopies))
ModulesToSaveWrapper = ModuleCopies
TrainableTokensWrapper = _class(
    "TrainableTokensWrapper",
    lambda module: isinstance(module, AdaptedLayer) and "token_adapter" in module._modules,
    AuxiliaryTrainingWrapper,
)

# AdaLoRA's are LoRA's too, in peft.
_ALSO = {"LORA": ("LORA", "ADALORA")}


# The methods whose tuners peft says share tensors between layers.
_SHARING = frozenset({"frod", "pvera", "tinylora", "unilora", "vblora", "vera"})


def _method_classes() -> dict[str, Any]:
    classes: dict[str, Any] = {}
    for package, stem in METHOD_STEMS.items():
        methods = _ALSO.get(package.upper(), (package.upper(),))
        classes[f"{stem}Layer"] = _class(f"{stem}Layer", _carries(methods), BaseTunerLayer, methods=methods)
        classes[f"{stem}Model"] = _class(f"{stem}Model", _is_tuner(methods), Tuner, kind=TunerClass)
        classes[f"{stem}Model"].uses_shared_state = package in _SHARING
    for package, (_, name) in PROMPT_CLASSES.items():
        classes[name] = _class(name, _makes_tokens(package.upper()), kind=PromptClass)
    return classes


CLASSES = _method_classes()
globals().update(CLASSES)
CLASSES["TrainableTokensLayer"].answers = staticmethod(
    lambda module: isinstance(module, TokenAdapter) or _carries(("TRAINABLE_TOKENS",))(module)
)
LoraLayer = CLASSES["LoraLayer"]

Linear = _lora_on("Linear", "Linear")
Embedding = _lora_on("Embedding", "Embedding")
Conv1d = _lora_on("Conv1d", "Conv1d")
Conv2d = _lora_on("Conv2d", "Conv2d")
Conv3d = _lora_on("Conv3d", "Conv3d")
MultiheadAttention = _lora_on("MultiheadAttention", "MultiheadAttention")
Linear4bit = _lora_on("Linear4bit", "Linear4bit")
Linear8bitLt = _lora_on("Linear8bitLt", "Linear8bitLt")
LoraParallelLinear = _lora_on("LoraParallelLinear", "ColumnParallelLinear", "RowParallelLinear")
TorchaoLoraLinear = _class(
    "TorchaoLoraLinear",
    lambda layer: (
        isinstance(layer, LoraLayer)
        and type(getattr(layer.get_base_layer(), "weight", None)).__module__.startswith("torchao.")
    ),
    LoraLayer,
)
ParamWrapper = _class("ParamWrapper", lambda layer: isinstance(layer, AdaptedParameter), LoraLayer)
# Versions of transformers up to 5.5 wrap this method of peft's.
ParamWrapper.update_layer = lambda layer, *args, **kwargs: None
BufferDict = _class("BufferDict", lambda module: isinstance(module, ParameterHolder))

PEFT_TYPE_TO_TUNER_MAPPING = {
    **{PeftType(package.upper()): CLASSES[f"{stem}Model"] for package, stem in METHOD_STEMS.items()},
    **{PeftType(package.upper()): CLASSES[encoder] for package, (_, encoder) in PROMPT_CLASSES.items()},
}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = {
    kind: tuner for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if kind in ("ADALORA", "LOHA", "LOKR", "LORA")
}
MODEL_TYPE_TO_PEFT_MODEL_MAPPING = {kind.task.value: kind for kind in PeftModel.__subclasses__() if kind.task}
