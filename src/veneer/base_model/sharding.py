"""Bases whose weights are spread over processes: tensor parallelism of transformers, and FSDP2 (``fully_shard``).

Both keep weights as ``DTensor``. Under FSDP2 a layer has its whole weight during a call, and each process its own rows
of the batch. Under tensor parallelism a layer computes a part of its output, or of its input's share, and every
process sees the same batch. Adapters are small: each process holds them whole, unless ``fully_shard`` comes after them.
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
    """Whether a tensor is a part of a larger one that is spread over processes."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Any:
    """All of a tensor. Every process has to ask for it at the same point."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sharded_parameter(modules: Iterable[nn.Module]) -> Any:
    """The first parameter that is spread over processes, or ``None``."""
    return next((p for m in modules for p in m._parameters.values() if is_sharded(p)), None)


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether a layer computes only a part: its weight is spread, and its ``forward`` replaced to match."""
    return "forward" in module.__dict__ and sharded_parameter([module]) is not None


def spread(x: Tensor, mesh: Any) -> Tensor:
    """This process's part of ``x`` along its last dimension; the gradients of all parts come back together."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    held = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    part: Tensor = held.redistribute(placements=[Shard(x.ndim - 1)]).to_local()
    return part


def gathered(x: Tensor, mesh: Any, size: int) -> Tensor:
    """All of a tensor, whose last dimension has ``size`` entries, from the parts; its gradient goes back in parts."""
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((*x.shape[:-1], size))
    stride = torch.empty(shape, device="meta").stride()
    held = DTensor.from_local(x, mesh, [Shard(x.ndim - 1)], run_check=False, shape=shape, stride=stride)
    found: Tensor = held.full_tensor()
    return found


def agree(tensors: Iterable[Tensor]) -> None:
    """Give every process the values of the first: new tensors that were drawn at random differ otherwise."""
    for tensor in tensors:
        torch.distributed.broadcast(tensor.detach(), src=0)


def is_data_parallel(modules: Iterable[nn.Module]) -> bool:
    """Whether a model is spread so that each process has a batch of its own, as under FSDP2."""
    known = list(modules)
    return sharded_parameter(known) is not None and not any(is_tensor_parallel(module) for module in known)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Let the processes average the gradients of parameters that each holds whole, as their own batches differ."""
    for parameter in parameters:
        if parameter.requires_grad and not is_sharded(parameter):
            parameter.register_post_accumulate_grad_hook(_average)


def _average(parameter: Tensor) -> None:
    if parameter.grad is not None:
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= torch.distributed.get_world_size()


@contextmanager
def one_writer(modules: Iterable[nn.Module]) -> Iterator[bool]:
    """Whether this process writes files; of those that share a model the first does, and the others wait for it."""
    if sharded_parameter(modules) is None:
        yield True
        return
    try:
        yield torch.distributed.get_rank() == 0
    finally:
        torch.distributed.barrier()


def check_site(site: Site) -> None:
    """Raise ``UnsupportedError`` for a layer that cannot be adapted in the way it is spread."""
    held = sharded_parameter([site.module])
    if held is None or not is_tensor_parallel(site.module):
        return
    if site.inside_layer:
        raise _refused(site.name, site.module, "adapting a parameter inside it")
    if held.device_mesh.ndim != 1:
        raise _refused(site.name, site.module, "adapting a layer spread in two ways at once")


def check_copy(name: str, module: nn.Module) -> None:
    """Raise ``UnsupportedError`` for a module of which an adapter cannot have a copy."""
    if sharded_parameter(module.modules()) is not None:
        raise _refused(name, module, "a copy of it (modules_to_save)")


def check_merge(name: str, module: nn.Module) -> None:
    """Raise ``MergeError`` for a layer of which each process holds a part."""
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
