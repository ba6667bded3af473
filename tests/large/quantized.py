"""Tiny quantised models: a Llama whose linear layers each library has packed."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import WIDE_LLAMA, build

# Layers that stay as they are, as transformers leaves them.
KEPT = ("lm_head",)


def library(name: str) -> Any:
    """A quantisation library, or a skipped test; what it warns of while it is imported is its own affair."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs the package {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def _each_linear(model: nn.Module, change: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name not in KEPT:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, change(module).eval())
    return model.requires_grad_(False).eval()


def _bits4(kind: str, nested: bool) -> Callable[[nn.Linear], nn.Module]:
    bnb = library("bitsandbytes")

    def change(layer: nn.Linear) -> nn.Module:
        options = {"quant_type": kind, "compress_statistics": nested, "compute_dtype": torch.float32}
        own = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, **options)
        own.load_state_dict(layer.state_dict())
        return own.to("cpu")  # type: ignore[no-any-return]

    return change


def _bits8() -> Callable[[nn.Linear], nn.Module]:
    bnb = library("bitsandbytes")

    def change(layer: nn.Linear) -> nn.Module:
        own = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
        own.load_state_dict(layer.state_dict())
        return own.to("cpu")  # type: ignore[no-any-return]

    return change


def _torchao(make: str) -> Callable[[nn.Linear], nn.Module]:
    library("torchao")
    quantization: Any = library("torchao.quantization")
    group = importlib.import_module("torchao.quantization.granularity").PerGroup(16)

    def change(layer: nn.Linear) -> nn.Module:
        if make == "int8":
            quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
        elif make == "int4":
            config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group)
            quantization.quantize_(layer, config)
        return layer

    return change


def _hqq() -> Callable[[nn.Linear], nn.Module]:
    library("hqq")
    core: Any = library("hqq.core.quantize")
    config = core.BaseQuantizeConfig(nbits=4, group_size=16)
    return lambda layer: core.HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")


FORMS: Mapping[str, Callable[[], Callable[[nn.Linear], nn.Module]]] = {
    "bitsandbytes 4 bits": lambda: _bits4("nf4", nested=False),
    "bitsandbytes 4 bits, nested": lambda: _bits4("fp4", nested=True),
    "bitsandbytes 8 bits": _bits8,
    "torchao int8": lambda: _torchao("int8"),
    "torchao int4": lambda: _torchao("int4"),
    "HQQ 4 bits": _hqq,
}


def quantized(form: str, arch: str = WIDE_LLAMA) -> nn.Module:
    """A fresh quantised model, the same every time."""
    change = FORMS[form]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _each_linear(build(arch), change)
