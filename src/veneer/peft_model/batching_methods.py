"""Gives a PeftModel the continuous batching of transformers, whose thread runs under the caller's adapters."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from veneer.adapters.call import Call
from veneer.base_model.transformers_internals import wrap_generation_loop
from veneer.errors import AdapterError
from veneer.keywords import keywords, unknown_keywords
from veneer.patches.active_selection import ActiveSelection

if TYPE_CHECKING:
    from veneer.adapters.collection import Adapters


class BatchingMethods:
    """Holds the methods of a ``PeftModel`` for continuous batching.

    A manager of transformers calls the model in a thread of its own. Here it calls the ``PeftModel``, in the context in
    which it was started.
    """

    adapters: Adapters

    def generate_batch(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Generate as the base model's ``generate_batch`` does, under the adapters that are active when it is called.

        Raises:
            AdapterError: it is given ``adapter_names``, which it would leave unheeded.
        """
        if adapter_names is not None:
            raise AdapterError(
                "generate_batch packs requests anew in every step and does not take adapter_names.",
                hint="Use model.generate(..., adapter_names=[...]), or call generate_batch once for each adapter, "
                "after set_adapter(name).",
            )
        with Call(self.adapters):
            return self._as_base("generate_batch", kwargs, "max_new_tokens")(*args, **kwargs)

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


def _carry_choice(manager: Any, active_selection: ActiveSelection) -> None:
    """Let the thread that a manager starts run in a copy of the starter's context."""

    def in_context(loop: Callable[[], Any]) -> Callable[[], Any]:
        context = contextvars.copy_context()
        return lambda: context.run(active_selection.run, loop)

    wrap_generation_loop(manager, in_context)
