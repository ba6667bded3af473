"""PeftModel: a base model with adapters, whichever way it was loaded. Thin, over the set of adapters."""

from __future__ import annotations

import copy
import dataclasses
import errno
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.adapters import attach, replacing
from veneer.adapters.adapter import Adapter
from veneer.adapters.call import call
from veneer.adapters.collection import Adapters
from veneer.adapters.invocation_hook import InvocationHook
from veneer.adapters.merge import in_memory
from veneer.adapters.rejoined_tensors import rejoin
from veneer.adapters.row_layouts import Check
from veneer.adapters.saved_embeddings import SaveEnds, ends_to_save
from veneer.adapters.shadow_pass import ShadowPass
from veneer.adapters.status import TunerLayerStatus, TunerModelStatus, layer_status, model_status
from veneer.adapters.training_step import allocate, with_penalty
from veneer.adapters.xlora_pass import XLoraPass
from veneer.base_model import sharding
from veneer.checkpoints import save_set
from veneer.checkpoints.checkpoint import Checkpoint, Draft, in_memory_checkpoint
from veneer.checkpoints.key_mapping import with_keys
from veneer.checkpoints.older_layouts import in_current_layout
from veneer.configs.base import PeftConfig, PromptConfig, TargetedConfig
from veneer.configs.names import HEADS, PeftType, TaskType
from veneer.configs.patterns import matching
from veneer.errors import AdapterError, BaseMismatchError, BaseModelError, UnsupportedError, VeneerError
from veneer.files import adapter_folders
from veneer.files.adapter_folders import expert_source
from veneer.files.atomic_write import writing
from veneer.files.base_digest import BASE_DIGEST_KEY, base_digest
from veneer.files.lookup_options import OFFLINE, LookupOptions
from veneer.files.paths import is_file
from veneer.files.resolve import resolve
from veneer.files.source import Source
from veneer.keywords import READING, SETTLED, SOURCE, TOKEN, chosen, keywords, passed_on, strict, takes, unknown
from veneer.layers.quantized_merge import QuantizedMerge
from veneer.patches.selection import Selection
from veneer.patches.token_gate import prompt_decides
from veneer.peft_model.batching_methods import BatchingFace
from veneer.peft_model.delegation import fitted_class
from veneer.peft_model.load_report import AdapterReport, LoadReport, adapter_report, warnings_of
from veneer.peft_model.model_card import fetch_card, write_card
from veneer.peft_model.open_adapter import mixes_others, open_adapter, open_members
from veneer.peft_model.trainer_state import adapter_state, write_state
from veneer.peft_model.tuner import Tuner
from veneer.peft_model.xlora_methods import XLoraMethods
from veneer.printing import warn

# One name for each row of a batch, or (name, tokens) for each part of a packed sequence.
RowNames = Sequence[str | tuple[str, int]] | None

# What peft, transformers and accelerate hand to save_pretrained, and saving an adapter has no use for.
_SAVING = (
    *("path_initial_model_for_weight_conversion", "save_function", "max_shard_size", "save_peft_format"),
    *("push_to_hub", "token"),
)

# Set on a base model whose weights are no longer those of its files.
_CHANGED = "_veneer_weights_changed"


@strict
class PeftModel(XLoraMethods, BatchingFace, nn.Module):
    """A base model and any number of adapters on it.

    It behaves as the base model does (``generate``, ``config``, ``device``, pipelines, ``Trainer``) and adds the
    adapters' own features. Made by :func:`veneer.load`, :meth:`from_pretrained` or :func:`veneer.get_peft_model`.

    Args:
        model: the base model; it must carry no adapters.
        peft_config: the config of a first, new adapter.
        adapter_name: that adapter's name.

    Attributes:
        load_report: what the last load found, bound and made active.
    """

    task: ClassVar[TaskType | None] = None
    # The class as it is imported, of which the instance's own is a fitted subclass.
    kind: ClassVar[type[PeftModel]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let the fitted classes know which class they are fitted from."""
        if cls.__dict__.get("fitted"):
            return
        cls.kind = cls

    def __new__(cls, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> PeftModel:
        """An instance of the class that fits ``model``."""
        kind: Any = cls if model is None else fitted_class(cls, type(model))
        instance: PeftModel = object.__new__(kind)
        return instance

    def __init__(self, model: nn.Module, peft_config: PeftConfig | None = None, adapter_name: str = "default") -> None:
        nn.Module.__init__(self)
        _check_base(model)
        self.xlora_pass = XLoraPass()
        self.adapters = Adapters(model, (InvocationHook(), self.xlora_pass, ShadowPass()))
        tuner = self._modules["base_model"] = Tuner(model, self.adapters)
        tuner.belong_to(self)
        self._modules["prompt_encoder"] = self.adapters.prompts
        self.load_report: LoadReport | None = None
        self._base_digest: str | None = None
        self.training = model.training
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config)

    # -- the base ------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> Tuner:
        """The module between this one and the base model; ``base_model.model`` is the base."""
        tuner = self._modules["base_model"]
        assert isinstance(tuner, Tuner)
        return tuner

    def get_base_model(self) -> Any:
        """The base model, with the adapted layers in it."""
        return self._modules["base_model"]._modules["model"]  # type: ignore[union-attr]

    @property
    def base_digest(self) -> str | None:
        """The digest of the base's files; ``None`` when they are not on this machine or no longer tell the truth."""
        base = self.get_base_model()
        if self._base_digest is None and not getattr(base, _CHANGED, False):
            self._base_digest = _digest_of(getattr(base, "name_or_path", None))
        return self._base_digest

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "base_model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.get_base_model(), name)

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

    def forward(
        self,
        *args: Any,
        adapter_names: RowNames = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward pass under the active adapters.

        Args:
            *args: as the base model takes them.
            adapter_names: instead of the active adapters, one name for each row of the batch; ``"__base__"`` is
                the base model alone. For several sequences packed into one row, ``(name, tokens)`` for each of them.
            task_ids: the task of each row, shape ``(rows,)``, for methods that keep several tasks in one adapter.
            **kwargs: as the base model takes them.
        """
        with self._by_row(adapter_names, task_ids, args, kwargs):
            return with_penalty(self.adapters, self.get_base_model()(*args, **kwargs))

    def update_and_allocate(self, global_step: int) -> None:
        """Take ranks away from an AdaLoRA in training, or freeze groups of an AdaMSS, as its config's schedule says.

        Call it in each step after ``backward`` and before ``zero_grad``. The ranks that it takes away become zeros.

        Raises:
            AdapterError: none such is active and trainable.
        """
        allocate(self.adapters, global_step)

    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's ``generate`` under the active adapters, or under one for each row."""
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        with (
            self._by_row(adapter_names, task_ids, args, kwargs),
            prompt_decides(prompt if isinstance(prompt, Tensor) else None),
        ):
            return self.get_base_model().generate(*args, **kwargs)

    def generate_batch(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's ``generate_batch`` (continuous batching) under the active adapters.

        Raises:
            AdapterError: it is given ``adapter_names``, which it would leave unheeded.
        """
        if adapter_names is not None:
            raise AdapterError(
                "generate_batch packs requests anew in every step and does not take adapter_names.",
                hint="Use model.generate(..., adapter_names=[...]), or call generate_batch once for each adapter, "
                "after set_adapter(name).",
            )
        return super().generate_batch(*args, **kwargs)

    def _by_row(
        self, names: RowNames, task_ids: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AbstractContextManager[None]:
        if names is None and task_ids is None and not self.adapters.asks_for_places:
            return call(self.adapters)
        chosen = self.adapters.switch.selection if names is None else self.adapters.rows(names)
        chosen = dataclasses.replace(chosen, task_ids=task_ids)
        return call(self.adapters, self._checked(chosen, args, kwargs), task_ids)

    def _checked(self, selection: Selection, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Selection:
        """``selection`` for a call of the model with these arguments; what it needs of the layers is looked at.

        Raises:
            AdapterError: they do not give it.
        """
        if not torch.compiler.is_compiling():
            return Check(self.adapters).checked(selection, args, kwargs)
        self._checked_once(
            selection.applied, selection.is_mixed, selection.rows is not None, selection.task_ids is not None
        )
        return selection

    def _checked_once(self, *asked: Any) -> bool:
        Check(self.adapters).without_values(*asked)
        return True

    # What torch.compiler.assume_constant_result does, which would import the compiler first.
    _checked_once._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _apply(self, fn: Any, recurse: bool = True) -> PeftModel:
        with self.adapters.changing():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            rejoin(self.adapters)
        return self

    # -- loading and adding --------------------------------------------------------------------------------

    @classmethod
    @takes(*READING, *SOURCE, *SETTLED, renamed=TOKEN)
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **options: Any,
    ) -> PeftModel:
        """Load an adapter, or a set of them, onto a base model that is in memory.

        Args:
            model: the base model. Its layers are wrapped in place; ``unload()`` undoes it.
            model_id: the adapter's folder or hub id.
            adapter_name: its name on the model; the adapters of a set keep their own.
            is_trainable: whether it is loaded to be trained further: the model is then in training mode, and else in
                eval mode.
            config: used in place of the adapter's own config.
            **options: as for :meth:`load_adapter`.

        Raises:
            BindError: adapter and model do not fit. SourceError, ConfigError: the adapter cannot be read.
            UnknownKeywordError: an option is none of those.
        """
        started = time.perf_counter()
        if isinstance(model, PeftModel) and not model.adapters.by_name:
            model = model.get_base_model()
        _check_base(model)
        source = resolve(model_id, LookupOptions(**chosen(options, SOURCE)), what="adapter")
        how = _reading(options)
        members = adapter_folders.members(source)
        opened = open_members(members, how["strict"]) if members else [open_adapter(source, how["strict"], config)]
        peft_model = _class_for((config or opened[0].config).task_type, model)(model)
        report = LoadReport(path=str(model_id))
        peft_model.load_report = report
        if members:
            report.kind = "set of adapters"
            peft_model._load_set(members, opened, adapter_folders.active(source, members), is_trainable, how)
        else:
            peft_model._load(source, opened[0], adapter_name, is_trainable, **how)
        peft_model._set_mode(is_trainable)
        peft_model._finish_report(report, started)
        return peft_model

    @takes(*SOURCE, *SETTLED, renamed=TOKEN)
    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        torch_device: str | None = None,
        *,
        config: PeftConfig | None = None,
        strict: bool = True,
        strict_base: bool = False,
        autocast_adapter_dtype: bool = True,
        key_mapping: Mapping[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        **options: Any,
    ) -> AdapterReport:
        """Add an adapter from its folder or hub id. The active adapters stay as they are, if there are any.

        One that is on the model under this name already is replaced, and stays active and trainable if it was. Where
        the new one's tensors are of the same shapes they are copied into the old one's, so that an optimiser goes on
        with them. When the new one cannot be loaded, the old one stays.

        Args:
            model_id: the adapter's folder or hub id.
            adapter_name: its name on the model.
            is_trainable: whether it is loaded to be trained further. If not, the model is put into eval mode.
            torch_device: accepted for peft's sake: weights come straight from the file to their layer's device.
            config: used in place of the adapter's own config.
            strict: raise when adapter and model do not fit; else use what fits and warn.
            strict_base: raise when the base is not the one that the adapter records; else warn.
            autocast_adapter_dtype: give a half-precision adapter that is to be trained float32 weights.
                An adapter for inference keeps its dtype.
            key_mapping: regular expressions and what to put in the place of what they find in the checkpoint's keys,
                which are seen without ``base_model.model.``; the first that finds something counts.
            ignore_mismatched_sizes: peft's name for ``strict=False``.
            **options: ``revision``, ``subfolder``, ``token``, ``local_files_only``, ``cache_dir``,
                ``force_download``; and what peft takes and is settled here (``device_map``, ``low_cpu_mem_usage`` ...).

        Returns:
            What was bound; also kept in ``load_report``.

        Raises:
            BindError: adapter and model do not fit. SourceError, ConfigError: the adapter cannot be read.
            UnknownKeywordError: an option is none of those.
        """
        source = resolve(model_id, LookupOptions(**chosen(options, SOURCE)), what="adapter")
        strict = strict and not ignore_mismatched_sizes
        report = self._load(
            source,
            open_adapter(source, strict, config),
            adapter_name,
            is_trainable or self._is_trained(adapter_name),
            strict=strict,
            strict_base=strict_base,
            autocast_adapter_dtype=autocast_adapter_dtype,
            key_mapping=key_mapping,
            replace=True,
        )
        if self.training and not is_trainable:
            self.eval()
        return report

    def _is_trained(self, name: str) -> bool:
        return name in self.adapters.by_name and self.adapters.by_name[name].trainable

    def _set_mode(self, trained: bool) -> None:
        """Eval mode; or, for an adapter that is to be trained, training mode for what is the adapters' own.

        The base's own modules then stay in the mode that they are in, as in peft.
        """
        if not trained:
            self.eval()
            return
        self.training = self.base_model.training = True
        self.adapters.prompts.train()
        for layer in self.adapters.layers.values():
            layer.train_adapters()

    def _load(
        self,
        source: Source,
        checkpoint: Checkpoint,
        name: str,
        trainable: bool,
        *,
        strict: bool = True,
        strict_base: bool = False,
        autocast_adapter_dtype: bool = True,
        key_mapping: Mapping[str, str] | None = None,
        replace: bool = False,
    ) -> AdapterReport:
        if key_mapping:
            checkpoint = with_keys(checkpoint, key_mapping)
        fresh = replacing.spare(self.adapters, name) if replace else name
        base_check = self._check_identity(checkpoint, strict_base)
        with (
            matching(checkpoint.config, where=checkpoint.origin),
            self.adapters.replicated(checkpoint.config),
            self._with_experts(checkpoint.config, source, trainable),
        ):
            checkpoint = in_current_layout(checkpoint, self.adapters.catalog)
            adapter = attach.load(
                self.adapters,
                fresh,
                checkpoint,
                trainable=trainable,
                strict=strict,
                float32=trainable and autocast_adapter_dtype,
            )
            if fresh != name:
                adapter = replacing.replace(self.adapters, name, fresh)
        adapter.config.inference_mode = not trainable
        adapter.base_digest = checkpoint.metadata.get(BASE_DIGEST_KEY)
        if not self.adapters.switch.default.names:
            self.adapters.select(name)
        report = adapter_report(adapter, checkpoint, base_check, self.adapters)
        self._reported(report)
        return report

    @contextmanager
    def _with_experts(self, config: PeftConfig, beside: Source | None, trainable: bool) -> Iterator[None]:
        """Load the adapters that ``config`` mixes, unless they are here; take them off again if the block fails."""
        here, standing = set(self.adapters.by_name), self.adapters.switch.default
        trainable = trainable and bool(getattr(config, "use_trainable_adapters", False))
        try:
            for index, (name, path) in enumerate(config.expert_paths.items()):
                source = expert_source(name, index, path, beside)
                if mixes_others(source):  # or even itself, without end
                    raise UnsupportedError(
                        f"{source.origin}, to be mixed as {name!r}, mixes adapters itself.",
                        hint="Mix plain LoRA adapters.",
                    )
                if name not in here or self.adapters.get(name).origin != source.origin:
                    self._load(source, open_adapter(source), name, trainable)
            if not standing.names:  # the first of them was chosen for want of another
                self.adapters.switch.default = standing
            yield
        except BaseException:
            for name in self.adapters.by_name.keys() - here:
                self.adapters.delete(name)
            self.adapters.switch.default = standing
            raise

    def _swapped(self, adapter: Adapter, checkpoint: Checkpoint) -> None:
        """Note that an adapter has another's weights now."""
        base_check = self._check_identity(checkpoint, strict_base=False)
        adapter.config.inference_mode = not adapter.trainable
        adapter.base_digest = checkpoint.metadata.get(BASE_DIGEST_KEY)
        self.adapters.note_zero_layers(adapter)
        self._reported(adapter_report(adapter, checkpoint, base_check, self.adapters))

    def _load_set(
        self,
        members: Sequence[adapter_folders.Member],
        opened: Sequence[Checkpoint],
        active: Sequence[str],
        trainable: bool,
        options: dict[str, Any],
    ) -> None:
        # Those that mix others come after them.
        for member, checkpoint in sorted(
            zip(members, opened, strict=True), key=lambda one: mixes_others(one[0].source)
        ):
            self._load(member.source, checkpoint, member.name, trainable and member.name in active, **options)
        self.adapters.select(active)

    def _check_identity(self, checkpoint: Checkpoint, strict_base: bool) -> str:
        recorded = checkpoint.metadata.get(BASE_DIGEST_KEY)
        if recorded is None:
            return "not recorded"
        if self.base_digest is None:
            return "not known"
        if recorded == self.base_digest:
            return "same"
        message = (
            f"The adapter {checkpoint.origin} was trained on another base: it records {_short(recorded)}, and "
            f"this one is {_short(self.base_digest)}."
        )
        if strict_base:
            raise BaseMismatchError(
                message,
                hint="Load it on the base it was trained on, or pass strict_base=False to accept this one.",
            )
        warn(message + " Its answers may differ (strict_base=True makes this an error).")
        return "different"

    def _reported(self, adapter: AdapterReport) -> None:
        if self.load_report is None:
            self.load_report = LoadReport(path=adapter.origin)
        self.load_report.adapters = [a for a in self.load_report.adapters if a.name != adapter.name]
        self.load_report.adapters.append(adapter)
        self.load_report.warnings += warnings_of(adapter)
        self._keep_report()

    def _keep_report(self) -> None:
        """Let the report say what is on the model and active now."""
        if self.load_report is not None:
            present = self.adapters.by_name
            self.load_report.adapters = [a for a in self.load_report.adapters if a.name in present]
        self._note_active()

    def _note_active(self) -> None:
        if self.load_report is not None:
            self.load_report.active = list(self.adapters.switch.default.names)

    def _finish_report(self, report: LoadReport, started: float) -> None:
        base = self.get_base_model()
        report.model_class = type(base).__name__
        report.dtype = str(getattr(base, "dtype", "")).removeprefix("torch.")
        report.seconds["total"] = time.perf_counter() - started

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        seed: int | None = None,
    ) -> None:
        """Add a new adapter, to be trained. It becomes active when no other is.

        Args:
            adapter_name: its name.
            peft_config: its method and options. A copy is kept, and completed with what this model says.
            low_cpu_mem_usage: accepted for peft's sake; a new adapter's tensors are always made.
            autocast_adapter_dtype: give it float32 weights on a half-precision base; else the base's dtype.
            seed: of the random start; torch's own generator when ``None``.

        Raises:
            TargetError: the targets match nothing usable.
        """
        base = self.get_base_model()
        peft_config = copy.deepcopy(peft_config)
        if peft_config.base_model_name_or_path is None:
            peft_config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
        _add_heads(peft_config)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        with (
            matching(peft_config),
            self.adapters.replicated(peft_config),
            self._with_experts(peft_config, None, True),
        ):
            attach.create(self.adapters, adapter_name, peft_config, generator=generator, float32=autocast_adapter_dtype)
        peft_config.inference_mode = False
        if not self.adapters.switch.default.names:
            self.adapters.select(adapter_name)
        else:
            # Among trainable adapters only the active ones get gradients.
            self.adapters.select(self.adapters.switch.default.names)
        self._keep_report()

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        seed: int | None = None,
    ) -> None:
        """Combine adapters into a new one: a plain LoRA adapter in float32, frozen, which saves and loads anywhere.

        With ``D_i`` what adapter ``i`` makes of a layer's weight and ``w_i`` its weight, the new adapter's change is

        - ``"cat"``: the sum of ``w_i D_i``, exactly; its rank is the sum of the ranks;
        - ``"linear"``: the same, in the smallest rank that holds it;
        - ``"svd"``: the matrix of rank ``svd_rank`` nearest to that sum;
        - ``"magnitude_prune"``: the sum of ``w_i D_i``, each with only its share ``density`` of largest values;
        - ``"dare_linear"``: the same with values dropped at random and the others divided by ``density``
          (Yu et al. 2023, arXiv:2311.03099, equation 4);
        - ``"ties"``, ``"dare_ties"``: of the pruned or dropped ``w_i D_i``, for each value the mean of those that
          have the sign that prevails (Yadav et al. 2023, arXiv:2306.01708, section 3).

        Adapters of any method that changes weights can be combined, of different ranks and on different layers; a
        layer that one does not adapt has no change of it. There are no products of one adapter's A with another's
        B, which peft's ``linear``, ``ties``, ``dare_*`` and ``magnitude_prune`` have; those correspond here to its
        kinds that end in ``_svd``, which are accepted too.

        Args:
            adapters: their names.
            weights: one for each; negative ones take a change away.
            adapter_name: the new adapter's name. It becomes active only when no other is.
            combination_type: see above.
            svd_rank: the rank of the result; the largest of the adapters' ranks on a layer when ``None``.
            svd_clamp: must be ``None``: clamped factors are not the nearest matrix.
            svd_full_matrices: accepted for peft's sake; what it adds is never used.
            svd_driver: accepted for peft's sake; torch chooses it.
            density: see above, over 0 and up to 1.
            majority_sign_method: how signs are weighed, ``"total"`` by the sum, ``"frequency"`` by their number.
            seed: of what DARE drops; torch's own generator when ``None``.

        Raises:
            UnknownAdapterError: an adapter is not there. UnsupportedError: no LoRA can hold one of the changes.
        """
        from veneer.adapters.merge.combining import Combination, combine

        if svd_clamp is not None:
            raise UnsupportedError(
                f"svd_clamp={svd_clamp!r} would clamp the factors, which is not available.",
                hint="Leave it out: the result is then the matrix nearest to the sum.",
            )
        wanted = Combination(
            tuple(adapters), tuple(weights), combination_type, svd_rank, density, majority_sign_method, seed
        )
        with self.adapters.changing(()):
            self.adapters.check_new(adapter_name)
            config, tensors = combine(self.adapters, wanted)
            checkpoint = in_memory_checkpoint(config, tensors, f"the combination of {', '.join(adapters)}")
            made = attach.load(self.adapters, adapter_name, checkpoint, trainable=False)
        made.origin, made.base_digest = None, self.base_digest
        if not self.adapters.switch.default.names:
            self.adapters.select(adapter_name)
        self._keep_report()

    # -- choosing ------------------------------------------------------------------------------------------

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
        """What the adapters name as saved whole; ``None`` when they name nothing."""
        return {
            name for config in self.peft_config.values() for name in getattr(config, "modules_to_save", ()) or ()
        } or None

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
        """Whether a forward pass now uses an adapter."""
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

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter active, or several at once: their changes add up, in the order given.

        Takes the same time for any number of layers. A trainable adapter that becomes active gets gradients and
        the others none; one that was loaded for inference stays frozen (``set_requires_grad`` changes that).

        Args:
            adapter_name: one name or several.
            inference_mode: freeze the chosen adapters.
        """
        self.adapters.select(adapter_name)
        if inference_mode:
            for name in self.adapters.active:
                self.set_requires_grad(name, False)
        self._note_active()

    def using(self, adapter_name: str | Sequence[str]) -> AbstractContextManager[None]:
        """Inside the ``with`` block use these adapters; other threads and tasks do not see it."""
        return self.adapters.using(self.adapters.selection(adapter_name))

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Inside the ``with`` block the base runs alone; other threads and tasks do not see it."""
        return self.adapters.disabled()

    def disable_adapters(self) -> None:
        """Run the base alone until :meth:`enable_adapters`."""
        self.adapters.switch.enabled = False

    def enable_adapters(self) -> None:
        """Undo :meth:`disable_adapters`."""
        self.adapters.switch.enabled = True

    # peft's names for the two, on its tuners.
    disable_adapter_layers = disable_adapters
    enable_adapter_layers = enable_adapters

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            adapter = self.adapters.get(name)
            if requires_grad and adapter.unpadded:
                raise AdapterError(
                    f"{name!r} was prepared for hot-swapping, so its tensors hold more than is saved; it cannot train.",
                    hint="Load it again for training.",
                )
            adapter.trainable = requires_grad
            self.adapters.trains = self.adapters.trains or requires_grad
            self.adapters.require_grad(adapter, requires_grad and name in self.adapters.switch.default.names)
            self.adapters.watch(adapter)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the base runs alone until another is chosen."""
        self.adapters.delete(adapter_name)
        self._keep_report()

    def rename_adapter(self, old_name: str, new_name: str) -> None:
        """Give an adapter another name; active or not, it stays so."""
        self.adapters.rename(old_name, new_name)
        for adapter in self.load_report.adapters if self.load_report is not None else ():
            if adapter.name == old_name:
                adapter.name = new_name
        self._keep_report()

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """What is on each adapted layer: adapters, which are active and merged, where and whether they are trained."""
        return layer_status(self.adapters)

    def get_model_status(self) -> TunerModelStatus:
        """The same of the model as a whole."""
        return model_status(self, self.adapters)

    # -- merging -------------------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False, into: str | None = None
    ) -> None:
        """Put adapters (by default the active ones) into the base weights; :meth:`unmerge_adapter` undoes it.

        They become the active ones, beside any that is merged already. The original weights are kept in memory.
        Another selection still gives its right result while merged, at the speed of unmerged adapters.

        Args:
            adapter_names: which; the active ones when ``None``.
            safe_merge: check first that every merged weight is finite (``MergeError`` if not).
            into: required where the base is quantised, see :meth:`merge_and_unload`; only the adapted layers are
                dequantised, until they are unmerged.
        """
        in_memory.merge(self.adapters, adapter_names, check=safe_merge, into=into)
        self._keep_report()

    def unmerge_adapter(self) -> None:
        """Take the merged adapters out again: every base weight has its original bytes."""
        self.adapters.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        into: str | None = None,
    ) -> Any:
        """Put adapters into the base weights for good and return the plain base model.

        Args:
            progressbar: show progress on the terminal.
            safe_merge: check first that every merged weight is finite (``MergeError`` if not).
            adapter_names: which; the active ones when ``None``.
            into: required where the base is quantised: ``"dequantized"`` makes the whole model a plain one in its
                floating dtype; ``"requantized"`` packs the sums as the weights were packed, which can round much of
                the adapter away. :attr:`quantized_merge` says what was lost.
        """
        with _progress("merging", progressbar):
            merged = in_memory.merge_and_unload(self.adapters, adapter_names, check=safe_merge, into=into)
        setattr(merged, _CHANGED, True)
        self._base_digest = None
        return merged

    @property
    def quantized_merge(self) -> QuantizedMerge | None:
        """What the last merge into a quantised base lost, layer by layer; ``None`` when there was none."""
        return self.adapters.quantized_merge

    def unload(self) -> Any:
        """Take every adapter off and return the base model, each of its tensors bit-identical."""
        return self.adapters.unload()

    # -- saving --------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: SaveEnds = "auto",
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters in the PEFT format: ``default`` at the root, any other in a folder of its name.

        A model without adapters saves the base model instead, as transformers does. An adapter whose starting point
        takes a part of the base (``init_lora_weights="pissa"`` ...) is saved as a plain one of twice the rank, for the
        untouched base; ``path_initial_model_for_weight_conversion``, by which peft is asked for that, changes nothing.

        Args:
            save_directory: the folder.
            safe_serialization: must be true; pickles are not written.
            selected_adapters: which; all when ``None``.
            save_embedding_layers: save the rows of the embedding and of the output layer too; ``"auto"`` does where
                the vocabulary is another than in the base's files, and where an adapter is on one of them.
            is_main_process: write nothing in other processes. Of a model that is spread over processes the first
                writes, and all of them have to call this: they gather the tensors together.
            state_dict: take the tensors from here (as named by ``state_dict()``) where it has them.
            **kwargs: for a model without adapters, passed on to transformers. With adapters, what accelerate and
                transformers pass along and is settled here: ``save_function``, ``max_shard_size`` ...

        Raises:
            UnknownKeywordError: one of ``kwargs`` is none of those. UnsupportedError: it asks for something else.
        """
        if not self.adapters.by_name:
            with writing(Path(save_directory)):
                if is_file(Path(save_directory)):  # which transformers only logs
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
                self.get_base_model().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
            return
        _check_saving(kwargs)
        if not safe_serialization:
            raise UnsupportedError(
                "safe_serialization=False would write a pickle; Veneer writes safetensors only.",
                hint="Leave it out: every current tool reads safetensors.",
            )
        folder, state = Path(save_directory), state_dict or {}
        with self.adapters.switch.choosing:  # in another thread, none is renamed or deleted meanwhile
            names = list(self.adapters.by_name) if selected_adapters is None else list(selected_adapters)
            entries = [self.adapters.get(name) for name in names]
            drafts = {entry.name: self._draft(entry, folder, state, save_embedding_layers) for entry in entries}
            chosen, modules = self.adapters.switch.default.names, list(self.modules())
        with sharding.one_writer(modules) as first:
            if first and is_main_process:
                save_set.save(folder, drafts, chosen)
                write_state(self, folder, state)
                write_card(self, folder)

    def _draft(self, adapter: Adapter, folder: Path, state: dict[str, Tensor], ends: SaveEnds) -> Draft:
        digest = adapter.base_digest or self.base_digest
        return Draft(
            adapter_folders.place(folder, adapter.name),
            self.adapters.config_on_disk(adapter.name),
            self._tensors_to_save(adapter, state, ends),
            {} if digest is None else {BASE_DIGEST_KEY: digest},
        )

    def _tensors_to_save(self, adapter: Adapter, state: dict[str, Tensor], ends: SaveEnds) -> dict[str, Tensor]:
        """Checkpoint key -> tensor, in the dtype that it had on disk; from ``state`` where that has it."""
        beside = ends_to_save(self.adapters, adapter, ends)
        if adapter.unpadded:
            return {**beside, **adapter.unpadded}
        names = {id(tensor): name for name, tensor in self.state_dict(keep_vars=True).items()} if state else {}

        def value(live: Tensor) -> Tensor:
            tensor: Tensor = sharding.whole(state.get(names.get(id(live), ""), live).detach())
            if not tensor.numel() and live.ndim:
                raise AdapterError(
                    f"The tensors of adapter {adapter.name!r} are empty in this process; nothing was saved.",
                    hint="Under ZeRO-3 or FSDP1 gather them first, and pass state_dict= with the whole tensors.",
                )
            return tensor

        own = self.adapters.named_tensors(adapter.name, value)
        found = {key: tensor.to(adapter.saved_dtypes.get(key, tensor.dtype)) for key, tensor in own}
        return {**{key: value(tensor) for key, tensor in beside.items() if key not in found}, **found}

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, save_embedding_layers: SaveEnds = "auto"
    ) -> dict[str, Tensor]:
        """Checkpoint key -> tensor of one adapter (the active one when ``None``): what saving writes."""
        with self.adapters.switch.choosing:
            name = adapter_name or self.active_adapter
            return self._tensors_to_save(self.adapters.get(name), {}, save_embedding_layers)

    @takes(renamed=TOKEN, others=True)
    def push_to_hub(
        self,
        repo_id: str,
        save_embedding_layers: SaveEnds = "auto",
        *,
        private: bool | None = None,
        token: str | None = None,
        tags: Sequence[str] = (),
        max_shard_size: str | int | None = None,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Save the adapters and upload them to a hub repository, which is made if it is missing.

        A model card that the repository has keeps its text.

        Args:
            repo_id: ``owner/name``.
            save_embedding_layers: as for :meth:`save_pretrained`.
            private: whether a repository that is made is private.
            token: for the hub.
            tags: more tags for the model card.
            max_shard_size: accepted for peft's sake; an adapter is one file.
            safe_serialization: must be true; pickles are not written.
            **kwargs: as ``HfApi.upload_folder`` takes them: ``revision``, ``commit_message``, ``create_pr`` ...

        Raises:
            UnknownKeywordError: it does not take one of ``kwargs``.
        """
        from huggingface_hub import HfApi

        passed_on(PeftModel.push_to_hub, kwargs, HfApi.upload_folder)
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            fetch_card(api, repo_id, kwargs.get("revision"), folder)
            self.save_pretrained(
                folder, safe_serialization=safe_serialization, save_embedding_layers=save_embedding_layers
            )
            write_card(self, Path(folder), tags)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write ``README.md`` with the library, the base and tags; one that is there keeps its text."""
        write_card(self, Path(output_dir))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Torch's own; of a state of adapters alone, with ``strict=False``, the base's tensors are not missing.

        ``assign=True`` puts the given tensors in the place of the model's.
        """
        with self.adapters.changing():
            found: Any = super().load_state_dict(state_dict, strict, assign)
            rejoin(self.adapters)
        if strict or not found.missing_keys:
            return found
        own = adapter_state(self).keys()
        if not own >= state_dict.keys():
            return found
        return type(found)([name for name in found.missing_keys if name in own], found.unexpected_keys)

    # -- training ------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters, the adapters' included."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, wanted in counts if wanted), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print both numbers and the share."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")


PeftModel.kind = PeftModel


class PeftModelForCausalLM(PeftModel):
    """A causal language model with adapters."""

    task = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder model with adapters."""

    task = TaskType.SEQ_2_SEQ_LM


class PeftModelForSequenceClassification(PeftModel):
    """A sequence classifier with adapters; a new adapter brings its own head."""

    task = TaskType.SEQ_CLS


class PeftModelForTokenClassification(PeftModel):
    """A token classifier with adapters; a new adapter brings its own head."""

    task = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(PeftModel):
    """A model for extractive question answering with adapters; a new adapter brings its own head."""

    task = TaskType.QUESTION_ANS


class PeftModelForFeatureExtraction(PeftModel):
    """A model without a head, with adapters."""

    task = TaskType.FEATURE_EXTRACTION


_BY_TASK: dict[TaskType, type[PeftModel]] = {
    kind.task: kind
    for kind in (
        PeftModelForCausalLM,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        PeftModelForQuestionAnswering,
        PeftModelForFeatureExtraction,
    )
    if kind.task is not None
}


# peft keeps a class of its own for adapters of several methods on one model; here every model takes them.
PeftMixedModel = PeftModel


@takes()
def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    seed: int | None = None,
) -> PeftModel:
    """A base model with one new adapter, ready to be trained; the base is frozen.

    Args:
        model: the base model; its layers are wrapped in place.
        peft_config: the adapter's method and options.
        adapter_name: its name.
        mixed: accepted for peft's sake; adapters of other methods may join on any model.
        autocast_adapter_dtype: as for :meth:`PeftModel.add_adapter`, like ``low_cpu_mem_usage``.
        revision: of the base on the hub, to be noted in the adapter's config.
        low_cpu_mem_usage: accepted for peft's sake.
        seed: of the random start; torch's own generator when ``None``.

    Raises:
        TargetError: the config's targets match nothing usable.
    """
    if isinstance(model, PeftModel) and not model.adapters.by_name:
        model = model.get_base_model()
    _check_base(model)
    peft_model = _class_for(peft_config.task_type, model)(model)
    if revision is not None:
        peft_config = dataclasses.replace(peft_config, revision=revision)
    peft_model.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype, seed=seed)
    peft_model._set_mode(trained=True)
    return peft_model


def _blank(kind: type[PeftModel], base_class: type[nn.Module]) -> PeftModel:
    """An instance without contents, for copying and unpickling to fill."""
    instance: PeftModel = object.__new__(fitted_class(kind, base_class))  # type: ignore[assignment]
    return instance


def wrap(model: nn.Module, task: TaskType | str | None = None) -> PeftModel:
    """A PeftModel around a base model, with no adapter yet."""
    return _class_for(task, model)(model)


def _class_for(task: TaskType | str | None, model: nn.Module) -> type[PeftModel]:
    """The class for a task; when none is named, for the kind of model that the base's class name tells."""
    if task in _BY_TASK:
        return _BY_TASK[TaskType(task)]
    name = type(model).__name__
    endings = {
        "ForCausalLM": PeftModelForCausalLM,
        "LMHeadModel": PeftModelForCausalLM,
        "ForSequenceClassification": PeftModelForSequenceClassification,
        "ForTokenClassification": PeftModelForTokenClassification,
        "ForQuestionAnswering": PeftModelForQuestionAnswering,
    }
    for ending, kind in endings.items():
        if name.endswith(ending):
            return kind
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "ForConditionalGeneration" in name:
        return PeftModelForSeq2SeqLM
    return PeftModel


def _check_base(model: Any) -> None:
    if isinstance(model, (str, Path)):
        raise BaseModelError(
            f"The base model must be a model in memory here, not the path {str(model)!r}.",
            hint=f"Use veneer.load(adapter, base={str(model)!r}), which loads both.",
        )
    if isinstance(model, PeftModel):
        raise BaseModelError(
            "This is a PeftModel already; wrapping it again would stack its adapters.",
            hint="Use its load_adapter(...) or add_adapter(...), or wrap what its unload() returns.",
        )
    if not isinstance(model, nn.Module):
        raise BaseModelError(
            f"The base model must be a torch module, not {type(model).__name__}.",
            hint="Load it with transformers, or use veneer.load(adapter, base=...).",
        )


def _digest_of(origin: str | None) -> str | None:
    if not origin:
        return None
    try:
        digest: str = base_digest(resolve(origin, OFFLINE, what="base").root)
        return digest
    except VeneerError:
        return None


def _reading(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that say how an adapter is read, as :meth:`PeftModel._load` takes them."""
    how = chosen(options, READING)
    how["strict"] = how.get("strict", True) and not how.pop("ignore_mismatched_sizes", False)
    return how


def _check_saving(given: Mapping[str, Any]) -> None:
    """Refuse what saving adapters cannot do, or does not know."""
    unknown_ones = given.keys() - set(_SAVING)
    if unknown_ones:
        raise unknown("PeftModel.save_pretrained()", unknown_ones, [*keywords(PeftModel.save_pretrained), *_SAVING])
    if given.get("push_to_hub"):
        raise UnsupportedError(
            "save_pretrained(push_to_hub=True) would save without uploading.", hint="Call push_to_hub(repo_id) too."
        )


def _add_heads(config: PeftConfig) -> None:
    """A new adapter for a task with a head of its own trains the head too."""
    heads = HEADS.get(str(config.task_type), ())
    if heads and isinstance(config, (TargetedConfig, PromptConfig)):
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))


def _short(digest: str) -> str:
    return digest[:19] + "…"


@contextmanager
def _progress(what: str, shown: bool) -> Iterator[None]:
    if not shown:
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
