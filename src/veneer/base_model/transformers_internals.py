"""The parts of transformers that it does not document, each behind a function: a new version breaks this file alone.

Everything is imported where it is called, since transformers takes seconds. ``tests/base_model`` asks for each name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# The rules for loading are about parameters; a module is asked for by one that it may have.
_PARAMETER = ".weight"

# -- building ----------------------------------------------------------------------------------------------


def classes_for(auto_class: str, model_type: str) -> tuple[str, ...]:
    """Return the names of the classes that an auto class, such as ``AutoModelForCausalLM``, has for a model type."""
    import transformers

    names = getattr(transformers, auto_class)._model_mapping._model_mapping.get(model_type, ())
    return tuple(names) if isinstance(names, (tuple, list)) else (names,)


def named_class(config: Mapping[str, Any]) -> Any:
    """Return the class that a base's config names; ``None`` where transformers does not have it."""
    import transformers

    # A config may name anything that transformers has.
    named = [getattr(transformers, name, None) for name in config.get("architectures") or []]
    return next(
        (kind for kind in named if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)), None
    )


def build(kind: Any, config: Any, trust_remote_code: bool = False) -> Any:
    """Build a model of a config, without a checkpoint, as a class or auto class of transformers."""
    if hasattr(kind, "_model_mapping"):
        return kind.from_config(config, trust_remote_code=trust_remote_code)
    return kind._from_config(config)


@contextmanager
def without_memory() -> Iterator[None]:
    """Build models on the meta device inside the ``with`` block, their weights uninitialised."""
    import torch
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        yield


def set_name(model: Any, name: str) -> None:
    """Name a model, in the config that is saved with it too."""
    model.name_or_path = model.config._name_or_path = name


def replace_remote_code_timeout(seconds: Any) -> Any:
    """Set the seconds that transformers waits for leave to run a checkpoint's code, and return those of before."""
    from transformers import dynamic_module_utils

    before, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, seconds
    return before


# -- names in a checkpoint ---------------------------------------------------------------------------------


def conversion_classes() -> tuple[Any, Any, Any]:
    """Return the classes of the rules by which models are loaded: an operation, a conversion by it, a renaming."""
    from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

    return ConversionOps, WeightConverter, WeightRenaming


def get_model_conversion_mapping(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the rules by which a model is loaded: transformers' own function, which peft's module hands on."""
    from transformers.conversion_mapping import get_model_conversion_mapping as transformers_own

    return transformers_own(model, *args, **kwargs)


def conversions_of(model: Any) -> tuple[list[Any], list[Any]]:
    """Return the rules by which ``model`` is loaded: those that rename tensors, and those that make one of several."""
    _, WeightConverter, WeightRenaming = conversion_classes()
    rules = get_model_conversion_mapping(model) if hasattr(model, "base_model_prefix") else []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]


def renames_of(model: Any) -> Callable[[str], str]:
    """Return what turns a module's name in an older version into its name in ``model``; others stay as they are."""
    renamings, _ = conversions_of(model)
    # What a model's own code says, as those of transformers 4 did.
    patterns = getattr(model, "_checkpoint_conversion_mapping", None) or {}

    def rename(name: str) -> str:
        for pattern, replacement in patterns.items():
            new, count = re.subn(pattern, replacement, name)
            if count:
                return new
        parameter = renamed(name + _PARAMETER, renamings)
        return parameter.removesuffix(_PARAMETER) if parameter.endswith(_PARAMETER) else name

    return rename


def renamed(name: str, renamings: list[Any]) -> str:
    """Return a stored tensor's name after ``renamings``."""
    from transformers.core_model_loading import apply_renamings

    return apply_renamings(name, renamings)


def in_loading_order(names: Iterable[str]) -> list[str]:
    """Return the names of stored tensors in the order in which transformers loads them."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)


def parameter_for(
    name: str, renamings: list[Any], converters: list[Any], model: Any, state: dict[str, Any]
) -> tuple[str, str | None]:
    """Return the parameter that a stored tensor is loaded into, and the pattern of the converter that makes it of it.

    Args:
        name: the stored tensor's.
        renamings: of :func:`conversions_of`.
        converters: of :func:`conversions_of`.
        model: the model.
        state: its ``state_dict``.
    """
    from transformers.core_model_loading import rename_source_key

    prefix = getattr(model, "base_model_prefix", None)
    return rename_source_key(name, renamings, converters, prefix, state)


# -- quantised models --------------------------------------------------------------------------------------


def forget_quantization(model: Any) -> None:
    """Make the config of a model whose weights were dequantised that of a plain one."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def forget_packing_rules(model: Any) -> None:
    """Drop the rules that packed weights were loaded by: transformers saves by their inverses, which they lack."""
    rules = getattr(model, "_weight_conversions", None)
    if rules:
        steps = [(rule, getattr(rule, "operations", ())) for rule in rules]
        model._weight_conversions = [rule for rule, ops in steps if not any(hasattr(op, "hf_quantizer") for op in ops)]


# -- continuous batching -----------------------------------------------------------------------------------


def wrap_generation_loop(manager: Any, wrap: Callable[[Callable[[], Any]], Callable[[], Any]]) -> None:
    """Let a continuous batching manager run ``wrap(loop)`` in its thread; ``wrap`` is called by the one who starts it.

    A manager that was kept from another session is left as it is.
    """
    if "start" in vars(manager):
        return
    start, loop = manager.start, manager._run_generation_loop

    def start_wrapped() -> None:
        manager._run_generation_loop = wrap(loop)
        start()

    manager.start = start_wrapped
