"""The wrapper of a module that adapters bring whole (``modules_to_save``), such as a classification head."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base_model.sites.offload import copy_resident
from veneer.errors import AdapterError, UnsupportedError
from veneer.layers.any_names import Copies
from veneer.layers.base_tuner_layer import SelectsForLayer
from veneer.layers.read_weight import Unread
from veneer.patches.active_selection import ActiveSelection
from veneer.patches.row_layout import ROWS, Layout, refused
from veneer.patches.selection import Selection


class ModuleCopies(SelectsForLayer, nn.Module):
    """Stands in the place of a module; each adapter that trains it whole has a copy of its own.

    Its parameters are named as in peft: ``original_module.<p>``, ``modules_to_save.<adapter>.<p>``. Attributes
    that it does not have are those of the copy in use.

    Attributes:
        layout: the way in which its input holds the rows of a batch.
        behind_backbone: True where its input is the backbone's output, or some of its tokens.
    """

    layout: Layout = ROWS
    behind_backbone: bool = False
    counts_own = True
    # As in peft: the name under which the copies are held.
    adapter_layer_names = ("modules_to_save",)

    def __init__(self, module: nn.Module, active_selection: ActiveSelection) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = Copies()
        self.active_selection = active_selection
        self.training = module.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.current, name)
        selection = self.active_selection.current
        if selection.rows is None or not isinstance(value, Tensor) or torch.compiler.is_compiling():
            return value
        return Unread(value, partial(_refuse_rows, name)) if self.here(selection.used) else value

    @property
    def current(self) -> nn.Module:
        """The copy of the selected adapter, or the original."""
        names = self.here(self.active_selection.current.names)
        return self.modules_to_save[names[0]] if names else self.original_module

    def here(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of ``names`` that have a copy."""
        return tuple(name for name in names if name in self.copies)

    @property
    def copies(self) -> dict[str, Any]:
        """The copies by their adapters' names."""
        # Not ModuleDict's own methods: those forbid names such as "keys" or "forward".
        copies: dict[str, Any] = self.modules_to_save._modules
        return copies

    def add(self, adapter: str, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Add a copy of the original for ``adapter``, with memory of its own.

        Args:
            adapter: the name of the adapter.
            tensors: its values (parameter's name -> tensor), used in the wider of their own dtype and the
                original's, so that nothing is rounded; without them it starts as the original is. Where that is
                not the original's dtype the whole copy has the widest, for it computes in one.
        """
        copy = copy_resident(self.original_module)
        copy.requires_grad_(False)
        for name, tensor in (tensors or {}).items():
            _set(copy, name, tensor)
        if _dtypes(copy) != _dtypes(self.original_module):
            copy.to(functools.reduce(torch.promote_types, _dtypes(copy)))
        self.copies[adapter] = copy
        return copy

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return the name of each tensor of the module -> its name in an adapter's copy, as seen from this wrapper."""
        copy = self.copies.get(adapter_name)
        names = () if copy is None else copy.state_dict()
        return {name: f"modules_to_save.{adapter_name}.{name}" for name in names}

    def remove(self, adapter: str) -> None:
        """Drop an adapter's copy."""
        del self.copies[adapter]

    def trained(self, adapter: str) -> Iterator[nn.Parameter]:
        """Return the parameters of an adapter's copy."""
        yield from self.copies[adapter].parameters() if adapter in self.copies else ()

    def rename(self, old: str, new: str) -> None:
        """Give a copy another adapter's name."""
        self.copies[new] = self.copies.pop(old)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the selected copy; arguments and results are the original module's."""
        selection = self.active_selection.current
        if selection.rows is None:
            return self._run(self.current, args, kwargs)
        return self._forward_rows(selection, *args, **kwargs)

    def _forward_rows(self, selection: Selection, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.behind_backbone:
            selection = selection.behind_backbone(x)
        if selection.packed(x):
            return self._forward_rows(selection, x.squeeze(0), *args, **kwargs).unsqueeze(0)
        if not self.here(selection.used):
            output: Tensor = self.original_module(x, *args, **kwargs)
            return output
        if self.layout.dim < 0 and selection.is_mixed:
            raise refused("A module that an adapter brings whole")
        dim = max(self.layout.dim, 0)
        y: Tensor = self.original_module(x, *args, **kwargs)
        for name, rows in selection.groups(x.shape[dim], x.device, self.layout).items():
            if name in self.copies:
                output = self._run(self.copies[name], (x.index_select(dim, rows), *args), kwargs)
                _check_rows(output, y, name, dim)
                y = y.index_copy(dim, rows, output)
        return y

    def follows(self, layout: Layout) -> bool:
        """Tell whether the module can tell the rows of that layout apart."""
        return layout.dim >= 0

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a copy whose dtype may be wider than the model's."""
        dtype, base_dtype = _dtype(module), _dtype(self.original_module)
        if dtype == base_dtype:
            return module(*args, **kwargs)
        result = module(*(_cast(a, dtype) for a in args), **{k: _cast(v, dtype) for k, v in kwargs.items()})
        return _cast(result, base_dtype)

    def as_base_module(self, adapter: str) -> nn.Module:
        """Return an adapter's copy in the original's dtype, to stand in the model for good."""
        copy: nn.Module = self.copies[adapter]
        for tensor, base in zip(_tensors(copy), _tensors(self.original_module), strict=True):
            tensor.data = tensor.data.to(base.dtype)
        return copy


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _dtypes(module: nn.Module) -> list[torch.dtype]:
    return [tensor.dtype for tensor in _tensors(module) if tensor.is_floating_point()]


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _check_rows(output: Any, y: Any, name: str, dim: int) -> None:
    both = [value.shape[:dim] + value.shape[dim + 1 :] for value in (output, y) if isinstance(value, Tensor)]
    if len(both) < 2 or both[0] != both[1]:
        raise AdapterError(
            f"The module that adapter {name!r} brings whole gives another shape than the base's; one batch cannot "
            "hold both.",
            hint="Run the adapters of such a batch one after the other.",
        )


def _refuse_rows(name: str) -> Tensor:
    raise UnsupportedError(
        f"The model computes with {name!r} of a module that an adapter brings whole, where no row has its own.",
        hint="Run the rows of each adapter by themselves.",
    )


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    holder = module.get_submodule(owner)
    old = getattr(holder, leaf)
    new = tensor.to(device=old.device, dtype=torch.promote_types(tensor.dtype, old.dtype))
    setattr(holder, leaf, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)
