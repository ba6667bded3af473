"""Watches the passes of a base model by hooks on its modules, for methods whose layers need what a pass is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from veneer.base_model.model_call import new_cache
from veneer.errors import AdapterError

if TYPE_CHECKING:
    from veneer.adapters.adapter import Adapter
    from veneer.adapters.collection import Adapters

# The attribute of a layer of a cache that names the adapter that it belongs to, where it is not the base's.
_OWNER = "veneer_owner"


class PassHook(ABC):
    """Watches the passes of a base model while adapters are there that need it.

    Attributes:
        by_place: True where these adapters act by the place that an entry has in its row, whichever a call names.
    """

    by_place: ClassVar[bool] = False
    # Known while there is something to watch for, and no longer: a cycle keeps a model that is dropped, until Python
    # collects its garbage.
    adapters: Adapters

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    @abstractmethod
    def is_for(self, adapter: Adapter) -> bool:
        """Tell whether an adapter needs it."""

    @abstractmethod
    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        """Register the hooks."""

    def refresh(self, adapters: Adapters) -> None:
        """Watch from now on if there is an adapter that needs it, and no longer if there is none."""
        needed = any(self.is_for(adapter) for adapter in adapters.by_name.values())
        if needed and not self._handles:
            self.adapters, self._handles = adapters, self.hooks(adapters.model)
        if not needed:
            self.stop()

    def stop(self) -> None:
        """Watch no longer."""
        if self._handles:
            del self.adapters
        while self._handles:
            self._handles.pop().remove()

    def selected(self) -> dict[str, Adapter]:
        """Return the adapters of the pass that is under way."""
        if not self._handles:  # the last one was deleted while this call, which does not use it, came here
            return {}
        return {name: self.adapters.by_name[name] for name in self.adapters.active_selection.current.applied}


def own_cache(cache: Any, adapter: Adapter, module: nn.Module, decoder: nn.Module) -> Any:
    """Return the part of a cache for a pass of an adapter's own: layers behind the base's, which grow and move with it.

    Args:
        cache: of the call.
        adapter: the adapter.
        module: the base's, for which the cache is.
        decoder: the module that makes the pass.

    Raises:
        AdapterError: the cache holds tokens that the pass has not seen.
    """
    from transformers.cache_utils import Cache

    layers = [layer for layer in cache.layers if getattr(layer, _OWNER, None) == adapter.name]
    if not layers:
        if cache.get_seq_length():
            raise AdapterError(
                f"The cache was filled without {adapter.name!r} ({adapter.config.peft_type}), which is active now.",
                hint="Begin with an empty cache, or give all tokens again.",
            )
        if not cache.layers:
            cache.layers.extend(new_cache(module).layers)
        layers = new_cache(decoder).layers
        for layer in layers:
            setattr(layer, _OWNER, adapter.name)
        cache.layers.extend(layers)
    return Cache(layers=layers)
