"""PeftModel, a base model with adapters, and its classes for tasks: the public methods over the rooms below."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.adapters.bank import AdapterBank
from veneer.adapters.bank_plan import BankPlan
from veneer.adapters.call import call
from veneer.adapters.experts import join_routers
from veneer.adapters.known_layouts import Demands
from veneer.adapters.merge import in_memory
from veneer.adapters.merge.kept_copies import MergedCopiesReport
from veneer.adapters.row_layouts import RowCheck
from veneer.adapters.training_step import allocate, with_penalty
from veneer.configs.base import PeftConfig
from veneer.configs.names import TaskType
from veneer.errors import UnsupportedError, UsageError
from veneer.files.lookup_options import OFFLINE
from veneer.formats.base_facts import base_in_memory, given_base
from veneer.keywords import IGNORED, READING, SOURCE, TOKEN, strict, takes
from veneer.packages import stands_in_for_peft
from veneer.patches.selection import Selection
from veneer.peft_model import initial_adapter
from veneer.peft_model.attach_adapter import (
    AttachOptions,
    attach_adapter,
    combine_adapters,
    create_adapter,
    set_mode,
)
from veneer.peft_model.base_checks import check_base, note_changed
from veneer.peft_model.batching_methods import BatchingMethods
from veneer.peft_model.delegation import stands_for_peft
from veneer.peft_model.load_report import AdapterReport, LoadReport
from veneer.peft_model.open_adapter import find_adapter, open_adapter
from veneer.peft_model.peer_warnings import with_name_of
from veneer.peft_model.prompt_methods import PromptMethods
from veneer.peft_model.save_adapters import SavingMethods
from veneer.peft_model.shadow_methods import ShadowMethods
from veneer.peft_model.wrapped_again import without_adapters
from veneer.peft_model.xlora_methods import XLoraMethods
from veneer.printing import progress, warn

# One name for each row of a batch, or (name, tokens) for each part of a packed sequence; or a bank's plan of either.
RowNames = Sequence[str | tuple[str, int]] | BankPlan | None

# Task -> the class for it.
_BY_TASK: dict[TaskType, type[PeftModel]] = {}


@strict
class PeftModel(PromptMethods, XLoraMethods, ShadowMethods, BatchingMethods, SavingMethods):
    """Holds a base model and any number of adapters on it.

    It behaves as the base model does (``generate``, ``config``, ``device``, pipelines, ``Trainer``) and adds the
    adapters' own features. Made by :func:`veneer.load`, :meth:`from_pretrained` or :func:`veneer.get_peft_model`.

    Args:
        model: the base model; it must carry no adapters.
        peft_config: the config of a first, new adapter.
        adapter_name: that adapter's name.

    Attributes:
        load_report: the report of the last load: what it found, bound and made active.
        task: the task that the class is for.
        endings: endings of the names of base classes for this task.
    """

    task: ClassVar[TaskType | None] = None
    endings: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register a class for its task; one that is fitted to a base stays the kind that it is fitted from."""
        if "fitted" in cls.__dict__:
            return
        cls.kind = cls
        if cls.task is not None:
            _BY_TASK.setdefault(cls.task, cls)

    def __init__(self, model: nn.Module, peft_config: PeftConfig | None = None, adapter_name: str = "default") -> None:
        super().__init__(model)
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config)

    @classmethod
    def is_for(cls, model: nn.Module) -> bool:
        """Tell whether a base's class is, by its name, for this class's task."""
        return type(model).__name__.endswith(cls.endings)

    def forward(
        self,
        *args: Any,
        adapter_names: RowNames = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the base model under the active adapters.

        Args:
            *args: as the base model takes them.
            adapter_names: instead of the active adapters, one name for each row of the batch; ``"__base__"`` is
                the base model alone. For several sequences packed into one row, ``(name, tokens)`` for each of them.
                Or the plan of a bank (:meth:`bank`). While adapters are disabled all rows are the base's.
            task_ids: the task of each row, shape ``(rows,)``, for methods that keep several tasks in one adapter.
            **kwargs: as the base model takes them.
        """
        with self._by_row(adapter_names, task_ids, args, kwargs):
            return with_penalty(self.adapters, self.get_base_model()(*args, **kwargs))

    def update_and_allocate(self, global_step: int) -> None:
        """Remove ranks of an AdaLoRA in training, or freeze groups of an AdaMSS, as its config's schedule says.

        Call it in each step after ``backward`` and before ``zero_grad``. Removed ranks become zeros.

        Raises:
            AdapterError: no such adapter is active and trainable.
        """
        allocate(self.adapters, global_step)

    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[str] | BankPlan | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as the base model does, under the active adapters, or under one for each row."""
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        prompt = prompt if isinstance(prompt, Tensor) else None
        with self._by_row(adapter_names, task_ids, args, kwargs, prompt):
            return self.get_base_model().generate(*args, **kwargs)

    def _by_row(
        self,
        names: RowNames,
        task_ids: Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        prompt: Tensor | None = None,
    ) -> AbstractContextManager[None]:
        if names is None and task_ids is None and not self.adapters.asks_for_places:
            return call(self.adapters, prompt=prompt)
        selection = self.adapters.active_selection.current
        if isinstance(names, BankPlan):
            if not (selection.disabled or torch.compiler.is_compiling()):
                return self._by_plan(names, task_ids, args, kwargs, prompt)
            names = names.names
        if names is not None:
            rows = self.adapters.rows(names)
            selection = selection if selection.disabled else rows
        return self._call_with(selection, task_ids, args, kwargs, prompt)

    @contextmanager
    def _by_plan(self, plan: BankPlan, *asked: Any) -> Iterator[None]:
        """Call the model under the plan of a bank, whose slots stay as they are meanwhile."""
        if plan.bank.adapters is not self.adapters:
            raise UsageError(
                "The plan is of another model's bank.", hint="Make it with a bank of this model: model.bank()."
            )
        with plan.bank.reading(plan) as selection, self._call_with(selection, *asked):
            yield

    def _call_with(
        self,
        selection: Selection,
        task_ids: Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        prompt: Tensor | None,
    ) -> AbstractContextManager[None]:
        selection = dataclasses.replace(selection, task_ids=task_ids)
        return call(self.adapters, self._checked(selection, args, kwargs), task_ids, prompt)

    def _checked(self, selection: Selection, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Selection:
        """Check that the layers can follow a selection in a call with these arguments, and return it completed.

        Raises:
            AdapterError: they cannot.
        """
        if not torch.compiler.is_compiling():
            return RowCheck(self.adapters).checked(selection, args, kwargs)
        self._checked_once(*Demands.of(selection))
        return selection

    def _checked_once(self, *asked: Any) -> bool:
        RowCheck(self.adapters).check_compiled(Demands(*asked))
        return True

    # What torch.compiler.assume_constant_result does, which would import the compiler first.
    _checked_once._dynamo_marked_constant = True  # type: ignore[attr-defined]

    # -- loading and adding --------------------------------------------------------------------------------

    @classmethod
    @takes(*READING, *SOURCE, *IGNORED, renamed=TOKEN)
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **options: Any,
    ) -> PeftModel:
        """Load an adapter onto a base model that is in memory; :func:`veneer.load` loads a whole set of them.

        Args:
            model: the base model. Its layers are wrapped in place; ``unload()`` undoes it.
            model_id: the adapter's folder or hub id. Of a set of adapters the one at the folder's root is loaded.
            adapter_name: its name on the model.
            is_trainable: load it to train it further, with the model in training mode; else it is in eval mode.
            config: used in place of the adapter's own config.
            **options: as for :meth:`load_adapter`.

        Raises:
            BindError: adapter and model do not fit. SourceError, ConfigError: the adapter cannot be read.
            UnknownKeywordError: an option is unknown.
        """
        started = time.perf_counter()
        model = _plain_base(model)
        source = find_adapter(model_id, options)
        attaching = AttachOptions.of(is_trainable, options)
        checkpoint = open_adapter(source, attaching.strict, config, partial(given_base, model, OFFLINE))
        peft_model = wrap(model, checkpoint.config.task_type)
        peft_model.load_log.report = LoadReport(path=str(model_id))
        attach_adapter(peft_model, checkpoint, adapter_name, attaching)
        set_mode(peft_model, is_trainable)
        peft_model.load_log.finish(started)
        return peft_model

    @takes(*SOURCE, *IGNORED, renamed=TOKEN)
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
        with them. When the new one cannot be loaded, the old one stays. A LoRA that is new joins those that an Arrow
        router on the model sends tokens to.

        Args:
            model_id: the adapter's folder or hub id.
            adapter_name: its name on the model.
            is_trainable: load it to train it further. If not, the model is put into eval mode.
            torch_device: accepted for peft's sake: weights come straight from the file to their layer's device.
            config: used in place of the adapter's own config.
            strict: raise when adapter and model do not fit; else use what fits and warn.
            strict_base: raise when the base is not the one that the adapter records; else warn.
            autocast_adapter_dtype: give a half-precision adapter that is to be trained float32 weights.
                An adapter for inference keeps its dtype.
            key_mapping: regular expression -> replacement for its matches in the checkpoint's keys, taken without
                ``base_model.model.``; the first that matches counts.
            ignore_mismatched_sizes: peft's name for ``strict=False``.
            **options: ``revision``, ``subfolder``, ``token``, ``local_files_only``, ``cache_dir``,
                ``force_download``; and keywords of peft without effect here (``device_map`` ...).

        Returns:
            What was bound; also kept in ``load_report``.

        Raises:
            BindError: adapter and model do not fit. SourceError, ConfigError: the adapter cannot be read.
            UnknownKeywordError: an option is unknown.
        """
        source = find_adapter(model_id, options)
        present = self.adapters.by_name.get(adapter_name)
        attaching = AttachOptions(
            trainable=is_trainable or (present is not None and present.trainable),
            strict=strict and not ignore_mismatched_sizes,
            strict_base=strict_base,
            autocast_adapter_dtype=autocast_adapter_dtype,
            key_mapping=key_mapping,
            replace=True,
        )
        checkpoint = open_adapter(source, attaching.strict, config, partial(base_in_memory, self.adapters.catalog))
        report = attach_adapter(self, checkpoint, adapter_name, attaching)
        if present is None:
            join_routers(self.adapters, adapter_name)
        if self.training and not is_trainable:
            self.eval()
        return report

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
            low_cpu_mem_usage: leave its tensors without memory until ``set_peft_model_state_dict`` gives their values;
                an adapter whose layers share tensors has them all the same.
            autocast_adapter_dtype: give it float32 weights on a half-precision base; else the base's dtype.
            seed: of the random start; torch's own generator when ``None``.

        Raises:
            TargetError: the targets match nothing usable.
        """
        values, float32 = not low_cpu_mem_usage, autocast_adapter_dtype
        create_adapter(self, adapter_name, peft_config, float32=float32, seed=seed, values=values)

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

        With ``D_i`` the change that adapter ``i`` makes to a layer's weight and ``w_i`` its weight, the new change is

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

        A module that one of them brings whole comes along as it is, whatever its weight.

        Args:
            adapters: their names.
            weights: one for each; negative ones take a change away.
            adapter_name: the new adapter's name. It becomes active only when no other is.
            combination_type: see above.
            svd_rank: the rank of the result; the largest of the adapters' ranks on a layer when ``None``.
            svd_clamp: must be ``None``: clamped factors are not the nearest matrix.
            svd_full_matrices: accepted for peft's sake; the vectors that it adds are never used.
            svd_driver: accepted for peft's sake; torch chooses it.
            density: see above, over 0 and up to 1.
            majority_sign_method: weigh signs by the sum (``"total"``) or by their number (``"frequency"``).
            seed: the seed of DARE's drops; torch's own generator when ``None``.

        Raises:
            UnknownAdapterError: an adapter is not there. UnsupportedError: no LoRA can hold one of the changes.
        """
        from veneer.adapters.merge.combining import Combination

        if svd_clamp is not None:
            raise UnsupportedError(
                f"svd_clamp={svd_clamp!r} would clamp the factors, which is not available.",
                hint="Leave it out: the result is then the matrix nearest to the sum.",
            )
        combination = Combination(
            tuple(adapters), tuple(weights), combination_type, svd_rank, density, majority_sign_method, seed
        )
        combine_adapters(self, combination, adapter_name)

    # -- choosing ------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter active, or several at once: their changes add up, in the order given.

        Takes the same time for any number of layers. A trainable adapter that becomes active gets gradients and
        the others none; one that was loaded for inference stays frozen (``set_requires_grad`` changes that). In peft's
        place (see ``veneer.as_peft``) and in training mode it becomes trainable, as with peft.

        Args:
            adapter_name: one name or several.
            inference_mode: freeze the chosen adapters.
        """
        self.adapters.select(adapter_name)
        if inference_mode or (self.training and stands_for_peft(self)):
            self.set_requires_grad(self.adapters.active, not inference_mode)
        self.load_log.note_active()

    def using(self, adapter_name: str | Sequence[str]) -> AbstractContextManager[None]:
        """Use these adapters inside the ``with`` block; other threads and tasks do not see it."""
        return self.adapters.using(self.adapters.selection(adapter_name))

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Run the base alone inside the ``with`` block; other threads and tasks do not see it.

        In peft's place (see ``veneer.as_peft``) they do, as with peft, but for those inside a block of their own.
        """
        if stands_for_peft(self) and not torch.compiler.is_compiling():
            return self.adapters.active_selection.disabled_everywhere()
        return self.adapters.disabled()

    def disable_adapters(self) -> None:
        """Run the base alone until :meth:`enable_adapters`."""
        self.adapters.active_selection.enable(False)

    def enable_adapters(self) -> None:
        """Undo :meth:`disable_adapters`."""
        self.adapters.active_selection.enable(True)

    # peft's names for the two, on its tuners.
    disable_adapter_layers = disable_adapters
    enable_adapter_layers = enable_adapters

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.adapters.set_trainable(name, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the first that remains becomes active."""
        self.adapters.delete(adapter_name)
        self.load_log.sync()

    def bank(self, slots: int | Mapping[int, int] = 32, rank_buckets: Sequence[int] = (8, 16, 64)) -> AdapterBank:
        """Make a bank of this model's adapters, for batches of many adapters that come and go with each step.

        Args:
            slots: the number of slots of each bucket, or a bucket's rank -> the number of its own. A slot holds one
                adapter of up to the bucket's rank; one of a higher rank than any bucket's takes several.
            rank_buckets: the ranks of the buckets.
        """
        return AdapterBank(self.adapters, slots, rank_buckets)

    def rename_adapter(self, old_name: str, new_name: str) -> None:
        """Give an adapter another name; active or not, it stays so."""
        self.adapters.rename(old_name, new_name)
        self.load_log.rename(old_name, new_name)
        self.kept_copies.rename(old_name, new_name)

    # -- merging -------------------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False, into: str | None = None
    ) -> None:
        """Put adapters (by default the active ones) into the base weights; :meth:`unmerge_adapter` undoes it.

        They become the active ones, beside any that is merged already. The original weights are kept in memory.
        Another selection still gives its right result while merged, at the speed of unmerged adapters.

        Args:
            adapter_names: the adapters to merge; the active ones when ``None``.
            safe_merge: check first that every merged weight is finite (``MergeError`` if not).
            into: required where the base is quantised, see :meth:`merge_and_unload`; only the adapted layers are
                dequantised, until they are unmerged.
        """
        in_memory.merge(self.adapters, adapter_names, check=safe_merge, into=into)
        self.load_log.sync()

    def unmerge_adapter(self) -> None:
        """Take the merged adapters out again: every base weight has its original bytes."""
        self.adapters.unmerge()

    def keep_merged(
        self, *adapters: str | Sequence[str], memory: str | float | None = None
    ) -> MergedCopiesReport | None:
        """Keep the merged weights of the hottest adapters beside the base's.

        A call under one of them alone runs at the merged model's speed, however it is selected, and selecting stays as
        quick as it is. All other calls, mixed batches and training do as before. A copy is dropped, and its layer runs
        unmerged, once a weight that it was made of has changed; this call again makes it anew. Compiled code and a
        quantised, offloaded or spread layer run unmerged.

        Args:
            *adapters: their names, the hottest first; for several that are selected together, a list of names. Copies
                of others are dropped.
            memory: the most bytes for all copies, such as ``"2GB"``; no bound when ``None``. Layers for which there is
                none left run unmerged.

        Returns:
            What is kept, also in :attr:`merged_copies` and ``load_report``; ``None`` for no adapters.

        Raises:
            UnknownAdapterError: an adapter is not there. MergeError, UnsupportedError: no weight can hold one of them.
            AdapterError: one is to be trained, or this is asked for in a call that uses it.
        """
        self.kept_copies.keep(adapters, memory)
        return self.merged_copies

    def drop_merged(self) -> None:
        """Drop all merged copies that :meth:`keep_merged` keeps."""
        self.kept_copies.keep((), None)

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
            adapter_names: the adapters to merge; the active ones when ``None``.
            into: required where the base is quantised: ``"dequantized"`` makes the whole model a plain one in its
                floating dtype; ``"requantized"`` packs the sums as the weights were packed, which can round much of
                the adapter away. :attr:`quantized_merge` says what was lost.
        """
        with progress("merging", progressbar):
            merged = in_memory.merge_and_unload(self.adapters, adapter_names, check=safe_merge, into=into)
        note_changed(merged)
        self._base_digest = None
        return merged

    def unload(self, *, take_starts_off: bool | None = None) -> Any:
        """Take every adapter off and return the base model, each of its tensors bit-identical.

        Args:
            take_starts_off: take the starts of adapters (``init_lora_weights="pissa"`` ...) off its weights, for
                initial adapters that were saved with ``init_lora_weights=True``. ``None`` does so in peft's place
                only (see ``veneer.as_peft``), where the base is left so.

        Raises:
            UnsupportedError: the start of an adapter is to be taken off a packed weight.
        """
        if stands_for_peft(self) if take_starts_off is None else take_starts_off:
            with self.adapters.changing():
                initial_adapter.take_starts_off(self.adapters)
            note_changed(self.get_base_model())
        return self.adapters.unload()


PeftModel.kind = PeftModel


class PeftModelForCausalLM(PeftModel):
    """Holds a causal language model with adapters."""

    task = TaskType.CAUSAL_LM
    endings = ("ForCausalLM", "LMHeadModel")


class PeftModelForSeq2SeqLM(PeftModel):
    """Holds an encoder-decoder model with adapters."""

    task = TaskType.SEQ_2_SEQ_LM

    @classmethod
    def is_for(cls, model: nn.Module) -> bool:
        """Tell whether a base generates from what it encodes."""
        config = getattr(model, "config", None)
        return "ForConditionalGeneration" in type(model).__name__ and getattr(config, "is_encoder_decoder", False)


class PeftModelForSequenceClassification(PeftModel):
    """Holds a sequence classifier with adapters; a new adapter brings its own head."""

    task = TaskType.SEQ_CLS
    endings = ("ForSequenceClassification",)


class PeftModelForTokenClassification(PeftModel):
    """Holds a token classifier with adapters; a new adapter brings its own head."""

    task = TaskType.TOKEN_CLS
    endings = ("ForTokenClassification",)


class PeftModelForQuestionAnswering(PeftModel):
    """Holds a model for extractive question answering with adapters; a new adapter brings its own head."""

    task = TaskType.QUESTION_ANS
    endings = ("ForQuestionAnswering",)


class PeftModelForFeatureExtraction(PeftModel):
    """Holds a model without a head, with adapters."""

    task = TaskType.FEATURE_EXTRACTION


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
    """Put one new adapter on a base model, ready to be trained; the base is frozen.

    Args:
        model: the base model; its layers are wrapped in place.
        peft_config: the adapter's method and options.
        adapter_name: its name.
        mixed: accepted for peft's sake; adapters of other methods may join on any model.
        autocast_adapter_dtype: as for :meth:`PeftModel.add_adapter`.
        revision: of the base on the hub, to be noted in the adapter's config.
        low_cpu_mem_usage: as for :meth:`PeftModel.add_adapter`.
        seed: of the random start; torch's own generator when ``None``.

    Raises:
        TargetError: the config's targets match nothing usable.
    """
    base = _plain_base(model)
    peft_model = wrap(base, peft_config.task_type)
    peft_config = _with_revision(with_name_of(peft_config, base), revision)
    peft_model.add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype, seed=seed)
    set_mode(peft_model, trained=True)
    return peft_model


def _with_revision(config: PeftConfig, revision: str | None) -> PeftConfig:
    """Return a config that notes a revision of the base; warn where it noted another."""
    if revision is None or revision == config.revision:
        return config
    if config.revision is not None:
        warn(
            f"The peft config has already set base model revision to {config.revision}, overwriting with revision "
            f"{revision}."
        )
    noted = copy.copy(config)
    noted.revision = revision
    return noted


def wrap(model: nn.Module, task: TaskType | str | None = None) -> PeftModel:
    """Put a PeftModel, with no adapter yet, around a base model.

    Its class is that for ``task``; when none is named, that for the kind of model that the base's class name tells.
    """
    if task in _BY_TASK:
        return _BY_TASK[TaskType(task)](model)
    return next((kind for kind in _BY_TASK.values() if kind.is_for(model)), PeftModel)(model)


def _plain_base(model: nn.Module) -> nn.Module:
    """Return the base of a PeftModel without adapters, and any other model that can be a base as it is."""
    if isinstance(model, PeftModel) and not model.adapters.by_name:
        model = model.get_base_model()
    if stands_in_for_peft():
        model = without_adapters(model)
    check_base(model)
    return model
