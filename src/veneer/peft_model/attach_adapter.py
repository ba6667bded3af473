"""Puts adapters on a model: from checkpoints, one or a set; new ones; and combinations of those that are there."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from veneer.adapters import attach, replacing
from veneer.adapters.adapter import Adapter
from veneer.adapters.without_values import drop_values
from veneer.checkpoints.checkpoint import Checkpoint, in_memory_checkpoint
from veneer.checkpoints.layouts.key_mapping import with_keys
from veneer.checkpoints.layouts.older_layouts import in_current_layout
from veneer.configs.base import PeftConfig, PromptConfig, TargetedConfig
from veneer.configs.names import HEADS
from veneer.configs.patterns import matching
from veneer.errors import BaseMismatchError, UnsupportedError
from veneer.files.adapter_folders import expert_source
from veneer.files.base_digest import BASE_DIGEST_KEY
from veneer.files.source import Source
from veneer.keywords import READING, subset
from veneer.peft_model.adapted_model import AdaptedModel
from veneer.peft_model.delegation import stands_for_peft
from veneer.peft_model.load_report import AdapterReport
from veneer.peft_model.open_adapter import OpenedAdapters, mixes_others, open_adapter
from veneer.peft_model.peer_warnings import warn_of_name
from veneer.printing import warn

if TYPE_CHECKING:
    from veneer.adapters.merge.combining import Combination


@dataclass(frozen=True)
class AttachOptions:
    """Says how an adapter is read and put on a model.

    Attributes:
        trainable: it is to be trained further.
        strict: raise when adapter and model do not fit; else use what fits and warn.
        strict_base: raise when the base is not the one that the adapter records; else warn.
        autocast_adapter_dtype: give a half-precision adapter that is to be trained float32 weights.
        key_mapping: regular expression -> replacement for its matches in the checkpoint's keys.
        replace: take the place of an adapter of the same name.
    """

    trainable: bool = False
    strict: bool = True
    strict_base: bool = False
    autocast_adapter_dtype: bool = True
    key_mapping: Mapping[str, str] | None = None
    replace: bool = False

    @classmethod
    def of(cls, trainable: bool, options: Mapping[str, Any]) -> AttachOptions:
        """Take from the keywords of a public call those that say how an adapter is read."""
        reading = subset(options, READING)
        if reading.pop("ignore_mismatched_sizes", False):  # peft's name for it
            reading["strict"] = False
        return cls(trainable=trainable, **reading)


def attach_all(model: AdaptedModel, opened: OpenedAdapters, options: AttachOptions) -> None:
    """Put all adapters of one path on a model; those of a set are active that were when it was saved."""
    if opened.active is None:
        for name, checkpoint in opened.by_name.items():
            attach_adapter(model, checkpoint, name, options)
        return
    # Those that mix others come after them.
    for name, checkpoint in sorted(opened.by_name.items(), key=lambda item: bool(item[1].config.experts)):
        trainable = options.trainable and name in opened.active
        attach_adapter(model, checkpoint, name, replace(options, trainable=trainable))
    model.adapters.select(opened.active)
    model.load_log.note_active()


def attach_adapter(
    model: AdaptedModel, checkpoint: Checkpoint, name: str, options: AttachOptions | None = None
) -> AdapterReport:
    """Put an adapter from a checkpoint on a model. It becomes active when no other is.

    Raises:
        BindError: adapter and model do not fit. BaseMismatchError: the base is another, and that is to be an error.
    """
    options = options or AttachOptions()
    warn_of_name(name, checkpoint.config)
    adapters, source = model.adapters, checkpoint.source
    if options.key_mapping:
        checkpoint = with_keys(checkpoint, options.key_mapping)
    first_name = replacing.spare(adapters, name) if options.replace else name
    base_check = _check_identity(model, checkpoint, options.strict_base)
    with (
        matching(checkpoint.config, where=checkpoint.origin),
        adapters.replicated(checkpoint.config),
        _experts(model, checkpoint.config, source, options.trainable),
    ):
        checkpoint = in_current_layout(checkpoint, adapters.catalog)
        adapter = attach.load(
            adapters,
            first_name,
            checkpoint,
            trainable=options.trainable,
            strict=options.strict,
            float32=options.trainable and options.autocast_adapter_dtype,
        )
        if first_name != name:
            adapter = replacing.replace(adapters, name, first_name)
    _select_if_none(model, name)
    adapters.place_biases()
    return _record(model, adapter, checkpoint, base_check)


def note_swapped(model: AdaptedModel, adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Note that an adapter has the weights of another checkpoint now."""
    base_check = _check_identity(model, checkpoint, strict_base=False)
    adapter.note_zero_layers()
    _record(model, adapter, checkpoint, base_check)


def create_adapter(
    model: AdaptedModel,
    name: str,
    config: PeftConfig,
    *,
    float32: bool = True,
    seed: int | None = None,
    heads: bool = True,
    values: bool = True,
) -> None:
    """Put a new, trainable adapter on a model, and train the head that its task has too if ``heads``.

    Without ``values`` its tensors have no memory until they are set. In peft's place (see ``veneer.as_peft``) a config
    in ``inference_mode`` leaves it frozen.

    See :meth:`PeftModel.add_adapter`.
    """
    warn_of_name(name, config)
    config = copy.deepcopy(config)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model.get_base_model(), "name_or_path", None) or None
    if heads:
        _add_heads(config)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with matching(config), model.adapters.replicated(config), _experts(model, config, None, True):
        attach.create(model.adapters, name, config, generator=generator, float32=float32)
    frozen = config.inference_mode and stands_for_peft(model)
    config.inference_mode = frozen
    _select_if_none(model, name)
    # Of others that are on the model nothing changes.
    model.adapters.get(name).require_grad(name in model.adapters.active_selection.default.names)
    if frozen:
        model.adapters.set_trainable(name, False)
    model.adapters.place_biases()
    if not values:
        drop_values(model.adapters, model.adapters.get(name))
    model.load_log.sync()


def combine_adapters(model: AdaptedModel, combination: Combination, name: str) -> None:
    """Put the combination of several adapters on a model; see :meth:`PeftModel.add_weighted_adapter`."""
    from veneer.adapters.merge.combining import combine

    adapters = model.adapters
    with adapters.changing(()):
        adapters.check_new(name)
        config, tensors = combine(adapters, combination)
        checkpoint = in_memory_checkpoint(config, tensors, f"the combination of {', '.join(combination.names)}")
        combined = attach.load(adapters, name, checkpoint, trainable=False)
    combined.origin, combined.base_digest = None, model.base_digest
    _select_if_none(model, name)
    model.load_log.sync()


def set_mode(model: AdaptedModel, trained: bool) -> None:
    """Switch a model to eval mode; or, for an adapter that is to be trained, the adapters' parts to training mode.

    The base's own modules then stay in the mode that they are in, as in peft.
    """
    if not trained:
        model.eval()
        return
    model.training = model.base_model.training = True
    model.adapters.prompts.train()
    for layer in model.adapters.adapted_layers:
        layer.train_adapters()


@contextmanager
def _experts(model: AdaptedModel, config: PeftConfig, adapter_source: Source | None, trainable: bool) -> Iterator[None]:
    """Load the adapters that ``config`` mixes, unless they are on the model; take them off again if the block fails."""
    adapters = model.adapters
    present, default = set(adapters.by_name), adapters.active_selection.default
    options = AttachOptions(trainable=trainable and bool(getattr(config, "use_trainable_adapters", False)))
    try:
        for index, (name, path) in enumerate(config.expert_paths.items()):
            source = expert_source(name, index, path, adapter_source)
            if mixes_others(source):  # or even itself, without end
                raise UnsupportedError(
                    f"{source.origin}, to be mixed as {name!r}, mixes adapters itself.", hint="Mix plain LoRA adapters."
                )
            if name not in present or adapters.get(name).origin != source.origin:
                attach_adapter(model, open_adapter(source), name, options)
        if not default.names:  # the first of them was chosen for want of another
            adapters.active_selection.default = default
        yield
    except BaseException:
        for name in adapters.by_name.keys() - present:
            adapters.delete(name)
        adapters.active_selection.default = default
        raise


def _record(model: AdaptedModel, adapter: Adapter, checkpoint: Checkpoint, base_check: str) -> AdapterReport:
    """Let an adapter and the report say where its weights come from."""
    adapter.config.inference_mode = not adapter.trainable
    adapter.base_digest = checkpoint.metadata.get(BASE_DIGEST_KEY)
    return model.load_log.loaded(adapter, checkpoint, base_check)


def _select_if_none(model: AdaptedModel, name: str) -> None:
    if not model.adapters.active_selection.default.names:
        model.adapters.select(name)


def _check_identity(model: AdaptedModel, checkpoint: Checkpoint, strict_base: bool) -> str:
    """Compare a model's base with the one that a checkpoint records, and return the result in words."""
    recorded = checkpoint.metadata.get(BASE_DIGEST_KEY)
    if recorded is None:
        return "not recorded"
    if model.base_digest is None:
        return "not known"
    if recorded == model.base_digest:
        return "same"
    message = (
        f"The adapter {checkpoint.origin} was trained on another base: it records {_short(recorded)}, and "
        f"this one is {_short(model.base_digest)}."
    )
    if strict_base:
        raise BaseMismatchError(
            message, hint="Load it on the base it was trained on, or pass strict_base=False to accept this one."
        )
    warn(message + " Its answers may differ (strict_base=True makes this an error).")
    return "different"


def _short(digest: str) -> str:
    return digest[:19] + "…"


def _add_heads(config: PeftConfig) -> None:
    """Let a new adapter for a task with a head of its own train the head too."""
    heads = HEADS.get(str(config.task_type), ())
    if heads and isinstance(config, (TargetedConfig, PromptConfig)):
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))
