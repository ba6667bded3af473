"""Sites of linear layers whose weight another library has packed (quantised), and which multiply with it themselves.

An adapter acts beside such a layer. The weight is unpacked only when it is asked for: by DoRA for the lengths of its
rows, by a merge for the sum. A merge puts another layer in its place, since a packed weight cannot hold every change.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.offload import without_hook
from veneer.base_model.sites.site import Site
from veneer.errors import UnsupportedError

# The module that defines a packed layer, or its weight -> its library. Recognised by name: nothing is imported.
_LIBRARIES = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "hqq": "HQQ",
    "gptqmodel": "GPTQ",
    "auto_gptq": "GPTQ",
    "awq": "AWQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "vptq": "VPTQ",
    "spqr_quant": "SpQR",
    "compressed_tensors": "compressed-tensors",
    "optimum": "quanto",
    "transformers.integrations.gguf": "GGUF",
    "transformers.integrations.bitnet": "BitNet",
    "transformers.integrations.higgs": "HIGGS",
    "transformers.integrations.fbgemm_fp8": "FBGEMM",
    "transformers.integrations.finegrained_fp8": "fine-grained FP8",
}


class PackedSite(LinearSite):
    """``y = W x + b`` with a packed ``W``, shape ``(out, in)``."""

    is_packed = True

    @property
    def shape(self) -> tuple[int, int]:
        layer: Any = self.module
        return layer.out_features, layer.in_features

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape

    def base_with(self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        x = args[0]
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def store(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        raise UnsupportedError(
            f"{self.name} ({type(self.module).__name__}): its weight is packed and cannot be replaced in place.",
            hint='Use a start that leaves the base alone, or merge with into="dequantized".',
        )

    def weight(self) -> Tensor:
        """Return the weight as a float32 matrix, unpacked anew at each call."""
        if self.stored.is_meta:
            raise UnsupportedError(
                f"{self.name}: its packed weight is offloaded and cannot be unpacked.",
                hint="Load the base without offloading (max_memory, device_map).",
            )
        return self.unpacked()

    @abstractmethod
    def unpacked(self) -> Tensor:
        """Return the weight as the library unpacks it, float32."""

    @abstractmethod
    def packed(self, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
        """Return a layer of this kind that holds a float32 ``weight``, packed with this layer's settings."""

    def plain(self, weight: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> nn.Module:
        """Return a layer of the unpacked class that holds ``weight``, shape ``(out, in)``."""
        # transformers keeps the class, which loads what is saved: GPT-2's stores its weight transposed.
        kind: Any = getattr(self.module, "source_cls", nn.Linear)
        transposed, (out, inner) = kind.__name__ == "Conv1D", weight.shape
        with torch.device("meta"):
            layer: nn.Module = kind(out, inner) if transposed else nn.Linear(inner, out, bias=bias is not None)
        layer.weight = nn.Parameter((weight.T if transposed else weight).to(dtype).contiguous(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        return layer.train(self.module.training)


def packer(module: nn.Module) -> str | None:
    """Return the library that packed a layer's weight; ``None`` for one that is not packed."""
    weight = module._parameters.get("weight")
    kinds = (*type(module).__mro__, *(() if weight is None else type(weight).__mro__))
    return next((library for kind in kinds if (library := _library(kind.__module__)) is not None), None)


@cache
def _library(origin: str) -> str | None:
    """Return the packing library that a Python module belongs to; ``None`` for other modules."""
    return next((lib for place, lib in _LIBRARIES.items() if origin == place or origin.startswith(place + ".")), None)


def blank_copy(module: nn.Module, bias: nn.Parameter | None) -> nn.Module:
    """Return a copy of a layer with another bias and without hooks, its weight to be set."""
    copied = copy.copy(module)
    copied.__dict__["_parameters"] = {**module._parameters, "bias": bias}
    return without_hook(copied)


def dequantised_bias(site: Site) -> nn.Parameter | None:
    """Return a layer's bias as a parameter, where the library keeps it as a plain tensor too."""
    bias = cast("Tensor | None", getattr(site.module, "bias", None))
    if bias is None or isinstance(bias, nn.Parameter):
        return bias
    return nn.Parameter(bias.detach(), requires_grad=False)
