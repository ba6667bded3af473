"""Reads the values of a layer's parameters: from the live layer, or from wherever its base lies."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from veneer.base_model.sites import offload


class ParameterReader(Protocol):
    """Gives a site the values of its parameters, and the device on which to compute with them."""

    def read(self, layer: str, module: nn.Module, name: str, parameter: Tensor, *, below: bool = False) -> Tensor:
        """Return a parameter's values on the device where its layer computes.

        Args:
            layer: the layer's name in the model.
            module: the layer.
            name: the parameter's name in the layer.
            parameter: the parameter as the layer holds it.
            below: return the values without the adapters that are merged into the layer.
        """
        ...

    def device(self, module: nn.Module, parameter: Tensor) -> torch.device:
        """Return the device on which a layer computes."""
        ...


class LiveReader:
    """Reads the parameters of a model in memory, those that are offloaded too."""

    def read(self, layer: str, module: nn.Module, name: str, parameter: Tensor, *, below: bool = False) -> Tensor:
        """Return the parameter itself, unless it is offloaded or spread over processes."""
        return offload.resident(module, name, parameter, below=below)

    def device(self, module: nn.Module, parameter: Tensor) -> torch.device:
        """Return the parameter's device, or the one that an offloaded layer computes on."""
        return offload.execution_device(module) or parameter.device


LIVE = LiveReader()
