"""Reads and changes weights that accelerate offloads: it keeps them on disk or in CPU memory between calls.

Between calls such a layer holds meta tensors; its hook has a map from names to the values. Merged values are laid over
that map, and taken off again to unmerge: the values below are never touched.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# The attributes that a hook adds to a module.
HOOKED = ("forward", "_hf_hook", "_old_forward")


class Overlay(Mapping[str, Tensor]):
    """A hook's map with some values replaced.

    Args:
        below: the map as accelerate made it.
    """

    def __init__(self, below: Mapping[str, Tensor]) -> None:
        self.below = below
        self.replaced: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.replaced[name] if name in self.replaced else self.below[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(self.below), **self.replaced})

    def __len__(self) -> int:
        return len(list(iter(self)))


def offloading_hook(module: nn.Module) -> Any:
    """Return the hook that loads a module's weights for a call; ``None`` for a module that holds them itself."""
    hook = module.__dict__.get("_hf_hook")
    for part in (hook, *getattr(hook, "hooks", ())):
        if getattr(part, "offload", False) and getattr(part, "weights_map", None) is not None:
            return part
    return None


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device that a hook lets a module compute on; ``None`` for a module without a hook."""
    # Not getattr, whose failure costs a module more than the look-up.
    device = getattr(module.__dict__.get("_hf_hook"), "execution_device", None)
    return None if device is None else torch.device(device)


def resident(module: nn.Module, name: str, tensor: Tensor, *, below: bool = False) -> Tensor:
    """Return a parameter's values on the device that its layer computes on.

    Args:
        module: the layer.
        name: the parameter's.
        tensor: the parameter, which is returned unless it is on the meta device, or spread over processes.
        below: return the values without the adapters that are merged into the layer.
    """
    hook = offloading_hook(module) if tensor.is_meta else None
    if hook is None:
        # Under FSDP2 or tensor parallelism it is gathered; every process has to ask at the same point.
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    values = hook.weights_map
    if below and isinstance(values, Overlay):
        values = values.below
    return nn.Parameter(values[name].to(hook.execution_device), requires_grad=tensor.requires_grad)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the values of a module's own parameters and buffers, by name."""
    named = {**module._parameters, **module._buffers}
    return {name: resident(module, name, tensor) for name, tensor in named.items() if tensor is not None}


def lay_over(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Give an offloaded layer another value of a parameter.

    Args:
        module: the layer.
        name: the parameter's.
        value: is kept on disk where the layer's other values are. A meta tensor restores the value from before, and
            ``None`` removes a parameter that the layer did not have before.
    """
    hook = offloading_hook(module)
    if not isinstance(hook.weights_map, Overlay):
        hook.weights_map = Overlay(hook.weights_map)
    replaced: dict[str, Tensor] = hook.weights_map.replaced
    replaced.pop(name, None)
    if value is None:
        module.register_parameter(name, None)
        return
    if not value.is_meta:
        replaced[name] = _spilled(value.detach(), hook)
    module.register_parameter(name, nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad))


def _spilled(value: Tensor, hook: Any) -> Tensor:
    """Return ``value`` as a view of a file beside the others of its layer, or in CPU memory when they lie there."""
    folder = _folder(hook.weights_map)
    if folder is None:
        return value.cpu()
    with tempfile.NamedTemporaryFile(dir=folder, prefix="merged-", suffix=".bin", delete=False) as file:
        path = Path(file.name)
    flat = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype)
    flat.copy_(value.flatten())
    # The mapping keeps the file's contents until the tensor is dropped; the name is not needed any more.
    path.unlink()
    return flat.view(value.shape)


def _folder(values: Any) -> str | None:
    """Return the folder in which a map keeps its values; ``None`` for one that keeps them in memory."""
    while isinstance(values, Overlay):
        values = values.below
    values = getattr(values, "dataset", values)
    folder = getattr(values, "save_folder", None)
    return folder if folder is not None and Path(folder).is_dir() else None


def without_hook(module: nn.Module) -> nn.Module:
    """Remove the attributes that a hook has added to a module, usually a copy, and return it."""
    for name in HOOKED:
        module.__dict__.pop(name, None)
    return module


def copy_resident(module: nn.Module) -> nn.Module:
    """Return a deep copy that holds its weights in memory, wherever those of the original lie."""
    hooks = [m.__dict__["_hf_hook"] for m in module.modules() if "_hf_hook" in m.__dict__]
    # A hook refers to the weights of the whole model: it is shared, not copied.
    copied = copy.deepcopy(module, {id(hook): hook for hook in hooks})
    for part in copied.modules():
        if offloading_hook(part) is None:
            continue
        for name, value in own_tensors(part).items():
            if name in part._parameters:
                part.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=False))
            else:
                part._buffers[name] = value.clone()
        without_hook(part)
    return copied
