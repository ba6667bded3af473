"""Records which tokens a base model reads, while an adapter is there that acts from an invocation on (aLoRA)."""

from __future__ import annotations

from torch.utils.hooks import RemovableHandle

from veneer.adapters.collection import Adapters
from veneer.configs.base import TargetedConfig
from veneer.methods import method_of
from veneer.patches.token_gate import record_tokens


class InvocationHook:
    """The hooks on the base that note what each forward pass reads."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    @property
    def acts_by_place(self) -> bool:
        """Whether there is such an adapter."""
        return bool(self._handles)

    def refresh(self, adapters: Adapters) -> None:
        """Note it from now on if there is such an adapter, and no longer if there is none."""
        configs = [entry.config for entry in adapters.by_name.values() if isinstance(entry.config, TargetedConfig)]
        wanted = any(method_of(config).invocation(config) for config in configs)
        if wanted and not self._handles:
            self._handles = record_tokens(adapters.model)
        while self._handles and not wanted:
            self._handles.pop().remove()
