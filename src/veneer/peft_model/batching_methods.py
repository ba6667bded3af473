"""Gives a PeftModel the continuous batching of transformers, whose thread runs under the caller's adapters."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from veneer.adapters.bank_plan import BankPlan
from veneer.adapters.call import Call
from veneer.base_model.transformers_internals import wrap_generation_loop
from veneer.errors import AdapterError
from veneer.keywords import keywords, unknown_keywords
from veneer.patches.active_selection import ActiveSelection
from veneer.patches.selection import BASE

if TYPE_CHECKING:
    from veneer.adapters.collection import Adapters


class BatchingMethods:
    """Holds the methods of a ``PeftModel`` for continuous batching.

    A manager of transformers calls the model in a thread of its own. Here it calls the ``PeftModel``, in the context in
    which it was started.
    """

    adapters: Adapters

    def generate_batch(
        self,
        inputs: Sequence[list[int]],
        *args: Any,
        adapter_names: Sequence[str] | BankPlan | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as the base model's ``generate_batch`` does, under the adapters that are active when it is called.

        Args:
            inputs: the tokens of each prompt.
            *args: as the base model takes them.
            adapter_names: instead of the active adapters, one name for each prompt; ``"__base__"`` is the base model
                alone. The prompts of one adapter are packed together, and one adapter's come after another's. While
                adapters are disabled all are the base's.
            **kwargs: as the base model takes them.

        Raises:
            AdapterError: ``adapter_names`` has not a name for each prompt, or the manager is to outlive the call.
        """
        if isinstance(adapter_names, BankPlan):
            adapter_names = adapter_names.names
        if adapter_names is not None and not self.adapters.active_selection.current.disabled:
            return self._batch_by_adapter(inputs, adapter_names, *args, **kwargs)
        with Call(self.adapters):
            return self._as_base("generate_batch", kwargs, "max_new_tokens")(inputs, *args, **kwargs)

    def _batch_by_adapter(self, inputs: Sequence[list[int]], names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        if self.adapters.rows(names).by_token:
            raise AdapterError(
                "adapter_names holds parts of a packed row, and generate_batch packs the prompts itself.",
                hint="Give one name for each prompt.",
            )
        if len(names) != len(inputs):
            raise AdapterError(
                f"adapter_names has {len(names)} names for {len(inputs)} prompts.", hint="Give one for each prompt."
            )
        if kwargs.get("persistent_manager"):
            raise AdapterError(
                "A manager that outlives the call keeps to one adapter, and adapter_names may name several.",
                hint="Leave persistent_manager=True or adapter_names= out.",
            )
        outputs: dict[str, Any] = {}
        for name in dict.fromkeys(names):
            places = [place for place, other in enumerate(names) if other == name]
            with self.adapters.disabled() if name == BASE else self.adapters.using(self.adapters.selection(name)):
                answers = self.generate_batch([inputs[place] for place in places], *args, **kwargs)
            outputs.update(_requests_at(places, answers))
        return dict(sorted(outputs.items(), key=lambda item: _number(item[0])))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Make the base model's manager; all its steps run under the adapters that are chosen at its ``start()``."""
        manager = self._as_base("init_continuous_batching", kwargs)(*args, **kwargs)
        _carry_choice(manager, self.adapters.active_selection)
        return manager

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        """Return the base model's context manager, around a manager of :meth:`init_continuous_batching`."""
        method = self._as_base("continuous_batching_context_manager", kwargs)
        block: AbstractContextManager[Any] = method(*args, **kwargs)
        return block

    def destroy_cached_continuous_batching_manager(self) -> None:
        """Let go of the manager that was kept for another session."""
        self._as_base("destroy_cached_continuous_batching_manager")()

    def _as_base(self, name: str, given: Collection[str] = (), *more: str) -> Callable[..., Any]:
        """Bind a method of the base model's class to this model, which it then calls in the base's place.

        Args:
            name: the method's.
            given: the keywords that it is to be called with.
            *more: what it takes beside the keywords of its signature. Anything else it would not heed.

        Raises:
            UnknownKeywordError: one of ``given`` is none that it takes.
        """
        method: Callable[..., Any] = getattr(type(self.adapters.model), name).__get__(self)
        known = [*keywords(method), *more]
        if not set(known).issuperset(given):
            raise unknown_keywords(f"PeftModel.{name}()", set(given).difference(known), known)
        return method


def _requests_at(places: Sequence[int], answers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answers to some prompts of a batch, their requests named by the prompts' places in it."""
    for request, answer in answers.items():
        answer.request_id = request.replace(str(_number(request)), str(places[_number(request)]), 1)
    return {answer.request_id: answer for answer in answers.values()}


def _number(request: str) -> int:
    """Return the number of a request: 3 for ``req_3``, and for ``req_3__child#0``."""
    return int(request.removeprefix("req_").partition("__")[0])


def _carry_choice(manager: Any, active_selection: ActiveSelection) -> None:
    """Let the thread that a manager starts run in a copy of the starter's context."""

    def in_context(loop: Callable[[], Any]) -> Callable[[], Any]:
        context = contextvars.copy_context()
        return lambda: context.run(active_selection.run, loop)

    wrap_generation_loop(manager, in_context)
