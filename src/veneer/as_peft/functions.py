"""The functions and constants of peft's modules that Veneer has no use for itself, over Veneer's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veneer.configs.patterns import ENDING, match
from veneer.errors import AdapterError
from veneer.files.names import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS
from veneer.layers.base_tuner_layer import BaseTunerLayer
from veneer.peft_model.adapted_model import AdaptedModel, adapted_model

CONFIG_NAME = ADAPTER_CONFIG
SAFETENSORS_WEIGHTS_NAME = ADAPTER_WEIGHTS
WEIGHTS_NAME = ADAPTER_PICKLE


# -- the adapters of a model that has no PeftModel around it ---------------------------------------------------


def set_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: Any = None
) -> None:
    """Choose the adapters of a model; in ``inference_mode`` freeze them."""
    adapted_model(model).set_adapter(adapter_name, inference_mode)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: Any = None) -> list[str] | None:
    """Delete an adapter of a model, and return the adapters that are active then; ``None`` for none."""
    adapted = adapted_model(model)
    adapted.delete_adapter(adapter_name)
    return adapted.active_adapters or None


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Make adapters of a model trainable, or freeze them."""
    adapted_model(model).set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Give the half-precision tensors of an adapter float32, for training."""
    if not autocast_adapter_dtype:
        return
    for parameter in adapted_model(model).adapters.parameters(adapter_name):
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def check_adapters_to_merge(module: BaseTunerLayer, adapter_names: Sequence[str] | None = None) -> list[str]:
    """Return those of ``adapter_names`` (the active ones when ``None``) that are not in a layer's weight yet."""
    if isinstance(adapter_names, str):
        raise AdapterError(f"adapter_names must be a list of names, not {adapter_names!r}.", hint="Give [name].")
    names = module.active_adapters if adapter_names is None else adapter_names
    return [name for name in names if name not in module.merged_adapters]


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scale of every LoRA of a model inside the ``with`` block.

    Raises:
        AdapterError: the model has no LoRA.
    """
    if not isinstance(multiplier, (int, float)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and hasattr(m, "scaling")]
    if not layers:
        raise AdapterError("scaling is only supported for models with `LoraLayer`s.", hint="Give a model with a LoRA.")
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer, factors in zip(layers, before, strict=True):
            _set_scaling(layer, {name: factor * multiplier for name, factor in factors.items()})
        yield
    finally:
        for layer, factors in zip(layers, before, strict=True):
            _set_scaling(layer, factors)


def _set_scaling(layer: BaseTunerLayer, factors: dict[str, float]) -> None:
    scaling = layer.scaling
    for name, factor in factors.items():
        scaling[name] = factor


def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> AbstractContextManager[None]:
    """Return a ``with`` block that changes nothing: layers give their results in the dtype of their inputs anyway."""
    return nullcontext()


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Tell whether a path or hub id is an adapter's."""
    from veneer.configs.base import PeftConfig
    from veneer.errors import VeneerError

    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except VeneerError:
        return False
    return True


# -- modules and their names -----------------------------------------------------------------------------------


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Return the parent of a module, the module, and its name in the parent."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """Return the first key, taken as the regular expression of a name's ending, that matches; else the name."""
    found = (key for key in pattern_keys if match(key, ENDING, key_to_match))
    return next(found, key_to_match)


def has_valid_embedding_base_layer(layer: nn.Module) -> bool:
    """Tell whether a layer stands in the place of an embedding or of an output layer."""
    return isinstance(getattr(layer, "base_layer", None), (nn.Linear, nn.Embedding))


def get_embedding_layer_name(model: nn.Module, layer: Any, is_embedding_in_target_modules: bool) -> str | None:
    """Return the name of an embedding in a model, that of its base layer where it is adapted; ``None`` if it is not."""
    wanted = layer.base_layer if is_embedding_in_target_modules else layer
    return next((name for name, module in model.named_modules() if module is wanted), None)


def convert_peft_config_for_transformers(peft_config: Any, model: nn.Module, conversions: Any = None) -> None:
    """Leave a config as it is: the names of older versions of transformers are understood as they are."""


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Tell whether a repository on the hub has a file; ``None`` where it cannot be asked."""
    from huggingface_hub import file_exists

    try:
        return file_exists(repo_id, filename, **kwargs)
    except Exception:
        return None


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """Return the policy by which FSDP wraps a model's blocks, and each module with weights that are all trained."""
    import functools

    from accelerate.utils.dataclasses import get_module_class_from_name  # type: ignore[import-untyped]
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    base = model.get_base_model() if isinstance(model, AdaptedModel) else model
    names = [*(getattr(base, "_no_split_modules", None) or ())]
    blocks = {kind for kind in (get_module_class_from_name(model, name) for name in names) if kind is not None}

    def is_trained_leaf(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not [*module.named_children()] and weight is not None and weight.requires_grad

    leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=is_trained_leaf)
    whole = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks)
    return functools.partial(_or_policy, policies=[leaves, whole])


# -- weights and devices ---------------------------------------------------------------------------------------


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """Return a weight, transposed if ``fan_in_fan_out``."""
    return weight.T if fan_in_fan_out else weight


def infer_device() -> str:
    """Return the kind of the accelerator that torch finds; ``"cpu"`` without one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


def init_empty_weights(include_buffers: bool | None = None) -> AbstractContextManager[Any]:
    """Return accelerate's ``with`` block in which new modules have no memory."""
    from accelerate import init_empty_weights as accelerates  # type: ignore[import-untyped]

    block: AbstractContextManager[Any] = accelerates(include_buffers=include_buffers)
    return block


def onload_layer(layer: nn.Module) -> AbstractContextManager[None]:
    """Return a ``with`` block that changes nothing: layers read offloaded weights themselves."""
    return nullcontext()


def gather_params_ctx(param: Any, modifier_rank: int | None = 0, fwd_module: Any = None) -> AbstractContextManager[Any]:
    """Return the ``with`` block in which DeepSpeed's ZeRO-3 gathers parameters; it changes nothing without."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed  # type: ignore[import-not-found]

    block: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        param, modifier_rank=modifier_rank, fwd_module=fwd_module
    )
    return block


def dequantize_module_weight(module: nn.Module) -> nn.Parameter:
    """Return a layer's weight in a floating dtype, quantised or not."""
    from veneer.base_model.catalog import Catalog

    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    site = Catalog(nn.ModuleDict({"layer": module})).sites_at("layer")[0]
    return nn.Parameter(site.as_stored(site.weight()), requires_grad=False)


def get_bnb_param_type(param: nn.Parameter) -> Literal[False, "4bit", "8bit"]:
    """Return the number of bits of a parameter that bitsandbytes has packed; ``False`` for any other."""
    kinds: dict[str, Literal["4bit", "8bit"]] = {"Params4bit": "4bit", "Int8Params": "8bit"}
    return kinds.get(type(param).__name__, False)


def get_quantization_config(model: Any, method: str) -> Any:
    """Return the config by which a method has quantised a model; ``None`` if it has not."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if getattr(model, "quantization_method", None) == method else None


# -- what models of transformers were once asked for -----------------------------------------------------------


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Return tokens one place to the right, for a decoder's input; labels that are ignored become padding.

    Args:
        input_ids: shape ``(rows, length)``.
        pad_token_id: takes the place of -100.
        decoder_start_token_id: comes first.
    """
    if pad_token_id is None:
        raise AdapterError("self.model.config.pad_token_id has to be defined.", hint="Set it in the model's config.")
    start = input_ids.new_full((input_ids.shape[0], 1), decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def bloom_model_postprocess_past_key_value(past_key_values: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return prefixes, ``(keys and values, rows, heads, tokens, dim)``, as BLOOM's first code took them.

    Keys have the shape ``(rows * heads, dim, tokens)`` and values ``(rows * heads, tokens, dim)``.
    """
    joined = torch.cat(list(past_key_values))
    keys, values = (half.flatten(1, 2) for half in joined.chunk(2))
    return tuple(zip(keys.transpose(2, 3), values, strict=True))


TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}


# -- signatures and caches, which Veneer's models have by themselves -------------------------------------------


def update_signature(model: Any, method: str = "all") -> None:
    """Change nothing: a PeftModel's ``forward`` and ``generate`` have the signatures of the base's already.

    Raises:
        AdapterError: ``method`` is none of ``"forward"``, ``"generate"`` and ``"all"``.
    """
    if method not in ("forward", "generate", "all"):
        raise AdapterError(f"method {method!r} is not supported.", hint='Choose "forward", "generate" or "all".')


def update_forward_signature(model: Any) -> None:
    """Change nothing: see :func:`update_signature`."""


def update_generate_signature(model: Any) -> None:
    """Change nothing: see :func:`update_signature`."""


class DoraCaching:
    """Changes nothing, called or as a ``with`` block: in inference Veneer keeps what DoRA computes anyway."""

    def __call__(self, enabled: bool = False) -> None:
        """Change nothing."""

    def __enter__(self) -> DoraCaching:
        """Change nothing."""
        return self

    def __exit__(self, *error: object) -> None:
        """Change nothing."""
