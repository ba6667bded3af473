"""Holds a base model and its adapters, answers questions about them, and stands in for the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from veneer.adapters.collection import Adapters
from veneer.adapters.invocation_hook import InvocationHook
from veneer.adapters.merge.kept_copies import MergedCopies, MergedCopiesReport
from veneer.adapters.rejoined_tensors import rejoin
from veneer.adapters.shadow_pass import ShadowPass
from veneer.adapters.status import TunerLayerStatus, TunerModelStatus, layer_status, model_status
from veneer.adapters.xlora_pass import XLoraPass
from veneer.configs.base import PeftConfig
from veneer.configs.names import PeftType
from veneer.configs.type_mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from veneer.errors import AdapterError, NoAdaptersError
from veneer.layers.quantized_merge import QuantizedMerge
from veneer.peft_model.base_checks import check_base, digest_of
from veneer.peft_model.delegation import fitted_class
from veneer.peft_model.load_report import LoadLog, LoadReport
from veneer.peft_model.trainer_state import adapter_state
from veneer.peft_model.tuner import Tuner


class AdaptedModel(nn.Module):
    """Holds the base model, the set of adapters on it, and the log of what was loaded.

    Args:
        model: the base model; it must carry no adapters.
    """

    # The class that is imported; an instance's own class is a subclass fitted to its base.
    kind: ClassVar[type[AdaptedModel]]

    def __new__(cls, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> AdaptedModel:
        """Make an instance of the class that fits ``model``."""
        return object.__new__(cls) if model is None else _blank(cls, type(model))

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        check_base(model)
        self.xlora_pass = XLoraPass()
        self.shadow_pass = ShadowPass()
        self.adapters = Adapters(model, (InvocationHook(), self.xlora_pass, self.shadow_pass))
        tuner = self._modules["base_model"] = Tuner(model, self.adapters)
        tuner.belong_to(self)
        self._modules["prompt_encoder"] = self.adapters.prompts
        self.kept_copies = MergedCopies(self.adapters)
        self.load_log = LoadLog(self.adapters)
        self._base_digest: str | None = None
        self.training = model.training

    @property
    def base_model(self) -> Tuner:
        """The module between this one and the base model; ``base_model.model`` is the base."""
        tuner = self._modules["base_model"]
        assert isinstance(tuner, Tuner)
        return tuner

    def get_base_model(self) -> Any:
        """Return the base model, with the adapted layers in it."""
        return self._modules["base_model"]._modules["model"]  # type: ignore[union-attr]

    @property
    def base_digest(self) -> str | None:
        """The digest of the base's files; ``None`` when they are not on this machine or hold other weights."""
        if self._base_digest is None:
            self._base_digest = digest_of(self.get_base_model())
        return self._base_digest

    @property
    def load_report(self) -> LoadReport | None:
        """The report of the last load: what was found, bound and made active, and the merged copies that are kept."""
        if self.load_log.report is not None:
            self.load_log.report.merged_copies = self.merged_copies
        return self.load_log.report

    @property
    def merged_copies(self) -> MergedCopiesReport | None:
        """The merged copies that are kept now (see :meth:`PeftModel.keep_merged`); ``None`` without any."""
        return self.kept_copies.report()

    # -- what the adapters are -----------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter's name -> its config."""
        return {name: adapter.config for name, adapter in self.adapters.by_name.items()}

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the first active adapter."""
        return self.adapters.get(self.active_adapter).config

    @property
    def peft_type(self) -> PeftType | str | None:
        """The method of the first adapter; ``None`` when there is none."""
        return next((config.peft_type for config in self.peft_config.values()), None)

    @property
    def modules_to_save(self) -> set[str] | None:
        """The modules that the adapters name as saved whole; ``None`` when they name nothing."""
        named = [getattr(config, "modules_to_save", None) or () for config in self.peft_config.values()]
        return {name for names in named for name in names} or None

    @property
    def prefix(self) -> str | None:
        """The beginning of the names of the first adapter's tensors; ``None`` when there is none."""
        return None if self.peft_type is None else PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(self.peft_type))

    @property
    def model(self) -> Any:
        """The base model; its own ``model`` while no adapter is on a layer: with prompts alone, or with none."""
        base = self.get_base_model()
        on_layers = any(adapter.prompt is None for adapter in self.adapters.by_name.values())
        return base if on_layers else getattr(base, "model", base)

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The names of the parameters that carry adapters inside a layer: fused experts."""
        return [layer.site.id.replace(":", ".") for layer in self.adapters.layers.values() if layer.site.inside_layer]

    @property
    def targeted_module_names(self) -> list[str]:
        """The names of the modules that carry adapters."""
        return list(dict.fromkeys(layer.site.name for layer in self.adapters.layers.values()))

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's dtype, where it says one."""
        return getattr(self.get_base_model(), "dtype", None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """True while a forward pass uses an adapter."""
        return bool(self.adapters.active)

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters, in the order in which they apply; empty when the base runs alone."""
        return self.adapters.active

    @property
    def active_adapter(self) -> str:
        """The active adapter; the first when several are.

        Raises:
            AdapterError: none is.
        """
        names = self.adapters.active
        if not names:
            raise AdapterError("No adapter is active.", hint="Choose one with set_adapter(...).")
        return names[0]

    @property
    def quantized_merge(self) -> QuantizedMerge | None:
        """The losses of the last merge into a quantised base, layer by layer; ``None`` when there was none."""
        return self.adapters.quantized_merge

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """See :meth:`Tuner.prepare_model_for_gradient_checkpointing`."""
        return self.base_model.prepare_model_for_gradient_checkpointing(model)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell whether a LoRA can hold an adapter's change: see :func:`veneer.convert_to_lora`."""
        return self.base_model.supports_lora_conversion(adapter_name)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """Return what is on each adapted layer: adapters, active and merged ones, their devices and gradients."""
        return layer_status(self.adapters)

    def get_model_status(self) -> TunerModelStatus:
        """Return the same of the model as a whole."""
        return model_status(self, self.adapters)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trainable and of all parameters, the adapters' included."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trainable in counts if trainable), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print both numbers and the share."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    # -- standing in for the base --------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "base_model" not in self.__dict__.get("_modules", {}):
                raise
            # Of the tuner, as in peft: so that ``model`` is the base model, not a part of it.
            return getattr(self.base_model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What the base keeps for itself (config, generation_config ...) is set where the base will read it.
        base = self.__dict__.get("_modules", {}).get("base_model")
        if base is not None and name not in self.__dict__ and name in base.model.__dict__:
            setattr(base.model, name, value)
        else:
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The fitted class has no importable name; it is made again where the model is copied or unpickled.
        return _blank, (self.kind, type(self.get_base_model())), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.base_model.belong_to(self)

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedModel:
        with self.adapters.changing():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            rejoin(self.adapters)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state as torch does; with ``strict=False`` that of adapters alone misses no tensors of the base.

        ``assign=True`` puts the given tensors in the place of the model's.
        """
        with self.adapters.changing():
            mismatch: Any = super().load_state_dict(state_dict, strict, assign)
            rejoin(self.adapters)
        if strict or not mismatch.missing_keys:
            return mismatch
        adapter_keys = adapter_state(self).keys()
        if not adapter_keys >= state_dict.keys():
            return mismatch
        missing = [name for name in mismatch.missing_keys if name in adapter_keys]
        return type(mismatch)(missing, mismatch.unexpected_keys)


# Where a base model keeps the PeftModel of the adapters that were put into it with no PeftModel around it.
_INJECTED = "_veneer_injected"


def injected_in(base: nn.Module) -> AdaptedModel | None:
    """Return the PeftModel of the adapters that were injected into a base model; ``None`` if there are none.

    It is gone with the base's ``peft_config``: diffusers takes out the layers of all adapters by itself, and then that.
    """
    attributes = getattr(base, "__dict__", {})
    if "peft_config" not in attributes:
        attributes.pop(_INJECTED, None)
    owner: AdaptedModel | None = attributes.get(_INJECTED)
    return owner


def keep_injected(base: nn.Module, owner: AdaptedModel) -> None:
    """Let a base model keep the PeftModel of the adapters that are injected into it, and not as one of its modules."""
    vars(base)[_INJECTED] = owner


def drop_injected(base: nn.Module) -> None:
    """Let a base model keep no PeftModel of injected adapters any more."""
    vars(base).pop(_INJECTED, None)


# The classes of torch that hold a whole model: compiled, copied to devices, or spread over processes.
_WRAPPERS = ("OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def adapted_model(model: Any) -> AdaptedModel:
    """Return the PeftModel of a model with adapters, compiled or not, and of a wrapper such as DDP around it.

    Raises:
        NoAdaptersError: it is another model.
    """
    while not isinstance(model, AdaptedModel) and type(model).__name__ in _WRAPPERS:
        model = getattr(model, "_orig_mod", None) or model.module
    if isinstance(model, nn.Module):
        model = injected_in(model) or model
    if not isinstance(model, AdaptedModel):
        raise NoAdaptersError(
            f"No adapter layers found in the model: {type(model).__name__} is no model with adapters.",
            hint="Give what veneer.load(...) or get_peft_model(...) returned.",
        )
    return model


def _blank(kind: type[AdaptedModel], base_class: type[nn.Module]) -> AdaptedModel:
    """Make an instance without contents, for ``__init__``, copying or unpickling to fill."""
    instance: AdaptedModel = object.__new__(fitted_class(kind, base_class))  # type: ignore[assignment]
    return instance
