"""Handles bases spread over processes: by transformers' tensor parallelism, or by FSDP2 (``fully_shard``).

Both keep weights as ``DTensor``. Under FSDP2 a layer has its whole weight during a call, and each process has its own
rows of the batch. Under tensor parallelism a layer computes a part of its output, or the output of a part of its input,
and every process sees the same batch. Adapters are small: each process holds them whole, unless ``fully_shard`` comes
after them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base_model.sites.site import Site
from veneer.errors import MergeError, UnsupportedError


def is_sharded(tensor: object) -> bool:
    """Tell whether a tensor is spread over processes, each of which holds a part."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Any:
    """Return a tensor with all its parts. Every process has to ask for it at the same point."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sharded_parameter(modules: Iterable[nn.Module]) -> Any:
    """Return the first parameter that is spread over processes; ``None`` if none is."""
    return next((p for m in modules for p in m._parameters.values() if is_sharded(p)), None)


def is_tensor_parallel(module: nn.Module) -> bool:
    """Tell whether a layer computes only a part: its weight is spread, and its ``forward`` replaced to match."""
    return "forward" in module.__dict__ and sharded_parameter([module]) is not None


def spread(x: Tensor, mesh: Any) -> Tensor:
    """Return this process's part of ``x`` along its last dimension; the gradients of all parts are gathered."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    replicated = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    part: Tensor = replicated.redistribute(placements=[Shard(x.ndim - 1)]).to_local()
    return part


def gathered(x: Tensor, mesh: Any, size: int) -> Tensor:
    """Return a tensor, ``size`` long in its last dimension, from its parts; the gradient is spread in parts."""
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((*x.shape[:-1], size))
    stride = torch.empty(shape, device="meta").stride()
    parts = DTensor.from_local(x, mesh, [Shard(x.ndim - 1)], run_check=False, shape=shape, stride=stride)
    full: Tensor = parts.full_tensor()
    return full


def agree(tensors: Iterable[Tensor]) -> None:
    """Give every process the values of the first: tensors drawn at random would differ."""
    for tensor in tensors:
        torch.distributed.broadcast(tensor.detach(), src=0)


def is_data_parallel(modules: Iterable[nn.Module]) -> bool:
    """Tell whether a model is spread so that each process has a batch of its own, as under FSDP2."""
    modules = list(modules)
    return sharded_parameter(modules) is not None and not any(is_tensor_parallel(module) for module in modules)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters that every process holds whole, since their batches differ."""
    for parameter in parameters:
        if parameter.requires_grad and not is_sharded(parameter):
            parameter.register_post_accumulate_grad_hook(_average)


def _average(parameter: Tensor) -> None:
    if parameter.grad is not None:
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= torch.distributed.get_world_size()


def is_first() -> bool:
    """Tell whether this process is the first of those that share a model."""
    return bool(torch.distributed.get_rank() == 0)


@contextmanager
def one_writer(modules: Iterable[nn.Module]) -> Iterator[bool]:
    """Yield whether this process writes files: the first that shares a model does, and the others wait for it."""
    if sharded_parameter(modules) is None:
        yield True
        return
    try:
        yield is_first()
    finally:
        torch.distributed.barrier()


def check_site(site: Site) -> None:
    """Raise ``UnsupportedError`` for a layer that cannot be adapted in the way it is spread."""
    parameter = sharded_parameter([site.module])
    if parameter is None or not is_tensor_parallel(site.module):
        return
    if site.inside_layer:
        raise _refused(site.name, site.module, "adapting a parameter inside it")
    if parameter.device_mesh.ndim != 1:
        raise _refused(site.name, site.module, "adapting a layer spread in two ways at once")


def check_copy(name: str, module: nn.Module) -> None:
    """Raise ``UnsupportedError`` for a module that an adapter cannot copy, since it is spread."""
    if sharded_parameter(module.modules()) is not None:
        raise _refused(name, module, "a copy of it (modules_to_save)")


def check_merge(name: str, module: nn.Module) -> None:
    """Raise ``MergeError`` for a layer that is spread over processes."""
    if sharded_parameter([module]) is not None:
        raise MergeError(
            f"{name} is spread over processes; nothing was merged.",
            hint="Save the adapter, and merge it in one process: veneer.merge(adapter, base, out=...).",
        )


def _refused(name: str, module: nn.Module, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name} ({type(module).__name__}) is spread over processes, and {what} is not available there.",
        hint="Leave the layer out, or load the base in one process.",
    )
