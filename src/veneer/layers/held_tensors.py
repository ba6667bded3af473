"""The adapters' tensors of a layer, held as its submodules under peft's names: ``lora_A.<adapter>.weight``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from veneer.layers import token_adapter
from veneer.layers.adapter_shares import BoundAdapter, LayerAdapters
from veneer.layers.parameter_holder import ParameterHolder
from veneer.layers.token_adapter import TokenAdapter
from veneer.methods.base.method import around_adapter
from veneer.patches.watched_parameters import watch


class HeldTensors(LayerAdapters, nn.Module):
    """A module that holds the tensors of the adapters bound to its base layer.

    Attributes:
        held: adapter's name -> its tensors here beside those of its shares: common ones, frozen ones.
    """

    held: dict[str, Mapping[str, nn.Parameter]]

    def forget_cached(self) -> None:
        """Drop what inference keeps, because the layer is in another state now."""
        raise NotImplementedError

    def forget_adapter(self, adapter: str) -> None:
        """Drop what inference keeps of an adapter alone."""
        raise NotImplementedError

    def shares_changed(self, adapter: str) -> None:
        """Drop what is kept of an adapter, whose share of this layer is another now."""
        raise NotImplementedError

    def bind(self, adapter: str, share: BoundAdapter, tensors: Mapping[str, nn.Parameter]) -> None:
        """Add an adapter's tensors (leaf -> parameter), used as they are."""
        for leaf in share.leaves:
            self._place(adapter, leaf.memory_name, tensors[leaf.name], bool(leaf.buffer))
        watch([*tensors.values(), *share.shared.values()])
        self.bound.setdefault(adapter, []).append(share)
        self.shares_changed(adapter)

    def _place(self, adapter: str, name: str, tensor: nn.Parameter, is_buffer: bool, saved: bool = True) -> None:
        """Put a tensor among the layer's own, the adapter's name after its head; in state dicts if ``saved``."""
        # "lora_embedding_A" has no tail: the parameter itself is named by the adapter.
        head, tail = around_adapter(name)
        if not tail:
            _put(self._holder(head), adapter, tensor, is_buffer, saved)
            return
        # "encoders.0.weight" has the tail "0.weight": a parameter's own name has no dots.
        path, _, leaf = tail.rpartition(".")
        holder = self._holder(head)
        for name in [adapter, *path.split(".")] if path else [adapter]:
            holder = holder._modules.setdefault(name, ParameterHolder(self.training))  # type: ignore[assignment]
        _put(holder, leaf, tensor, is_buffer, saved)

    def hold(
        self, adapter: str, tensors: Mapping[str, nn.Parameter], trained: Collection[str] = (), saved: bool = True
    ) -> None:
        """Keep tensors that are not this layer's own share among its own, so that they move with the model."""
        if not tensors:
            return
        for name, tensor in tensors.items():
            self._place(adapter, name, tensor, name not in trained, saved)
        self.held[adapter] = {**self.held.get(adapter, {}), **tensors}

    def unbind(self, adapter: str) -> None:
        """Remove an adapter's tensors; the heads that are empty then go too."""
        shares = self.bound.pop(adapter)
        self.shares_changed(adapter)
        names = [leaf.memory_name for share in shares for leaf in share.leaves] + [*self.held.pop(adapter, ())]
        for head in {around_adapter(name)[0] for name in names}:
            for contents in _contents(self._holder(head)):
                contents.pop(adapter, None)
            self._holder(head)._non_persistent_buffers_set.discard(adapter)
            self._drop_empty(head)

    def _drop_empty(self, head: str) -> None:
        """Remove the module that holds tensors under ``head``, and the one around it, when nothing is in them."""
        outer, _, name = head.rpartition(".")
        around = self._holder(outer) if outer else self
        if not len(self._holder(head)):  # type: ignore[arg-type]
            del around._modules[name]
            if outer:
                self._drop_empty(outer)

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name; its tensors stay the same objects."""
        holders = [holder for _, holder in self._holders()]
        for by_adapter in (self.bound, self.held, *(contents for holder in holders for contents in _contents(holder))):
            if old in by_adapter:
                by_adapter[new] = by_adapter.pop(old)
        for holder in holders:
            if old in holder._non_persistent_buffers_set:
                holder._non_persistent_buffers_set = {*holder._non_persistent_buffers_set - {old}, new}
        self.merged = tuple(new if name == old else name for name in self.merged)
        self.forget_cached()

    def reset(self, adapter: str, share: BoundAdapter, settings: Any) -> None:
        super().reset(adapter, share, settings)
        self.shares_changed(adapter)

    def tensors(self, adapter: str, share: BoundAdapter) -> dict[str, nn.Parameter]:
        """Return the parameter of each leaf of an adapter's share of this layer."""
        return {leaf.name: self.placed(adapter, leaf.memory_name) for leaf in share.leaves}

    def placed(self, adapter: str, name: str) -> nn.Parameter:
        """Return a tensor by its adapter and its name: see :meth:`_place`."""
        head, tail = around_adapter(name)
        holder = self._holder(head)
        if not tail:
            return _tensor(holder, adapter)
        path, _, leaf = tail.rpartition(".")
        for inner in [adapter, *path.split(".")] if path else [adapter]:
            holder = holder._modules[inner]  # type: ignore[assignment]
        return _tensor(holder, leaf)

    def _holder(self, head: str) -> nn.Module:
        """Return the module that holds each adapter's tensors under ``head``; made if there was none."""
        # Not ModuleDict's own methods: those forbid names such as "keys" or "forward".
        holder = self._modules.get(head)
        if holder is not None:
            return holder
        around: nn.Module = self
        for name in head.split("."):
            if name not in around._modules:
                around._modules[name] = self._new_holder(name)
            around = around._modules[name]  # type: ignore[assignment]
        return around

    def _new_holder(self, name: str) -> ParameterHolder:
        is_around_tokens = name == token_adapter.NAME
        return TokenAdapter(self.training, self) if is_around_tokens else ParameterHolder(self.training)

    def exchange(self, adapter: str, other: Callable[[Tensor], Tensor]) -> None:
        """Put other tensors in the places of an adapter's own."""
        for _, holder in self._holders():
            leaves = holder._modules.get(adapter)
            below = [] if leaves is None else [(module, None) for module in leaves.modules()]
            for module, names in [(holder, [adapter]), *below]:
                for tensors in (module._parameters, module._buffers):
                    _exchange(tensors, names or list(tensors), other)
        self.watch()
        self.shares_changed(adapter)

    def own_tensors(self, adapter: str) -> dict[str, Tensor]:
        """Return every tensor of an adapter that lies at this layer, frozen and common ones included, by its place."""
        tensors: dict[str, Tensor] = {}
        for head, holder in self._holders():
            leaves, tensor = holder._modules.get(adapter), (holder._parameters | holder._buffers).get(adapter)
            if tensor is not None:
                tensors[head] = tensor
            elif leaves is not None:
                tensors.update((f"{head}.{leaf}", tensor) for leaf, tensor in named_tensors(leaves))
        return tensors

    def train_adapters(self) -> None:
        """Put the layer and its adapters into training mode, and leave the base layer's as it is."""
        self.training = True
        for _, holder in self._holders():
            holder.train()

    def _holders(self) -> Iterator[tuple[str, nn.Module]]:
        """Return the modules that hold the adapters' tensors, by their names."""
        for head, module in self._modules.items():
            if head == token_adapter.NAME:
                yield from ((f"{head}.{name}", inner) for name, inner in module._modules.items())  # type: ignore[misc, union-attr]
            elif head != "base_layer" and module is not None:
                yield head, module

    def watch(self) -> None:
        """Watch those tensors of the adapters that are not trained, which may be other objects than before."""
        for _, holder in self._holders():
            watch(tensor for _, tensor in named_tensors(holder))


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return the parameters and buffers of a module and of those in it, each under all of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _put(holder: nn.Module, name: str, tensor: nn.Parameter, is_buffer: bool, saved: bool) -> None:
    (holder._buffers if is_buffer else holder._parameters)[name] = tensor
    if not saved:
        holder._non_persistent_buffers_set.add(name)


def _tensor(holder: nn.Module, name: str) -> nn.Parameter:
    tensor = holder._parameters.get(name)
    return holder._buffers[name] if tensor is None else tensor  # type: ignore[return-value]


def _contents(holder: nn.Module) -> tuple[Any, ...]:
    """Return what a module holds, by name: the tensors and modules of each adapter."""
    return holder._modules, holder._parameters, holder._buffers


def _exchange(tensors: dict[str, Any], names: Collection[str], other: Callable[[Tensor], Tensor]) -> None:
    for name in names:
        old = tensors.get(name)
        if old is not None:
            tensors[name] = nn.Parameter(other(old), requires_grad=old.requires_grad)
