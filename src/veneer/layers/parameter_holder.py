"""Holds the adapters' tensors of a layer by name, at the cost of no module's containers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from veneer.layers.any_names import AnyNames
from veneer.patches.watched_parameters import note_edit, watch


class Exchanged(dict[str, Any]):
    """Holds tensors by name, and notes an edit when one takes another's place.

    ``torch.func.functional_call`` puts tensors straight into a module's containers.
    """

    __slots__ = ()

    def __setitem__(self, name: str, tensor: Any) -> None:
        before = self.get(name)
        super().__setitem__(name, tensor)
        if before is not None and not torch.compiler.is_compiling():
            note_edit()


# The containers of a fresh nn.Module (hooks, buffers ...) beside its parameters: attribute -> type.
_KEPT = {k: type(v) for k, v in vars(nn.Module()).items() if k not in ("training", "_parameters")} | {
    "_buffers": Exchanged
}


class ParameterHolder(AnyNames):
    """Holds tensors by name: ``lora_A`` those of each adapter, ``lora_A.default`` one's ``weight``.

    ``layer.lora_A["default"].weight`` works as on peft's layers.
    """

    def __init__(self, training: bool) -> None:
        # Not nn.Module's own, which makes a dozen containers; these are made when something asks for them.
        # 3.4 -> 0.2 ms a load, and most garbage collections: benchmarks/notes.md, Attach.
        vars(self).update(training=training, _parameters=Exchanged())

    def __getattr__(self, name: str) -> Any:
        if name in _KEPT:
            return vars(self).setdefault(name, _KEPT[name]())
        try:
            return super().__getattr__(name)
        except AttributeError:
            if tensors := self._tensors_of_leaf(name):
                return tensors
            if name == "bias" and "weight" in self._parameters:  # as of a torch layer without one
                return None
            raise

    def _tensors_of_leaf(self, leaf: str) -> dict[str, Tensor]:
        """Return adapter -> its tensor of that name: ``token_adapter.trainable_tokens_delta["default"]``."""
        held = {
            name: (leaves._parameters | leaves._buffers).get(leaf) for name, leaves in self._modules.items() if leaves
        }
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "bias" and isinstance(value, nn.Parameter):
            self._parameters.setdefault(name, None)  # or the None that is read above would be in the way
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter):
            self._exchanged()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        buffers = dict(self._buffers)
        super()._load_from_state_dict(*args, **kwargs)
        self._keep_buffers(buffers)
        self._exchanged()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._keep_buffers(buffers)
        return self

    def _keep_buffers(self, buffers: dict[str, Any]) -> None:
        """Give buffers the values that torch has put in their places: other layers know them by these objects."""
        for name, buffer in buffers.items():
            # Assigned by load_state_dict, one becomes a parameter.
            current = self._parameters.pop(name) if name in self._parameters else self._buffers[name]
            if current is not buffer:
                buffer.data, self._buffers[name] = current, buffer

    def _exchanged(self) -> None:
        """Watch the tensors, which are others than before, and drop what inference kept of those."""
        watch([*self._parameters.values(), *self._buffers.values()])
        note_edit()

    def extra_repr(self) -> str:
        """Return shape and dtype of the tensors, for a model's print-out."""
        shown = [f"{name}: {list(p.shape)}, {p.dtype}" for name, p in self._tensors.items() if p is not None]
        return "; ".join(shown)

    @property
    def _tensors(self) -> dict[str, Any]:
        return self._parameters | self._buffers

    def __getitem__(self, name: str) -> Any:
        return self._modules[name] if name in self._modules else self._tensors[name]

    def __setitem__(self, name: str, value: Any) -> None:
        is_module = isinstance(value, nn.Module)
        (self._modules if is_module else self._buffers if name in self._buffers else self._parameters)[name] = value
        watch(value.parameters() if isinstance(value, nn.Module) else [value])
        note_edit()

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._modules) + len(self._tensors)

    def keys(self) -> list[str]:
        """Return the names."""
        return [*self._modules, *self._tensors]

    def values(self) -> list[Any]:
        """Return the tensors and modules."""
        return [self[name] for name in self]

    def items(self) -> list[tuple[str, Any]]:
        """Return the names with their tensors and modules."""
        return [(name, self[name]) for name in self]
