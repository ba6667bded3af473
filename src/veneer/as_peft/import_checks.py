"""Tells which packages there are and how old they are, by the names of peft's ``import_utils``."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from packaging.version import Version


def _has(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


def _reaches(package: str, version: str) -> bool:
    return Version(Version(importlib.metadata.version(package)).base_version) >= Version(version)


def is_aqlm_available() -> bool:
    """Tell whether aqlm is installed."""
    return _has("aqlm")


def is_bnb_available() -> bool:
    """Tell whether bitsandbytes is installed."""
    return _has("bitsandbytes")


def is_bnb_4bit_available() -> bool:
    """Tell whether bitsandbytes is installed, which has 4-bit layers in all versions that Veneer takes."""
    return is_bnb_available()


def is_diffusers_available() -> bool:
    """Tell whether diffusers is installed."""
    return _has("diffusers")


def is_eetq_available() -> bool:
    """Tell whether eetq is installed."""
    return _has("eetq")


def is_gptqmodel_available() -> bool:
    """Tell whether gptqmodel is installed."""
    return _has("gptqmodel")


def is_hqq_available() -> bool:
    """Tell whether hqq is installed."""
    return _has("hqq")


def is_inc_available() -> bool:
    """Tell whether Intel's neural compressor is installed."""
    return _has("neural_compressor")


def is_optimum_available() -> bool:
    """Tell whether optimum is installed."""
    return _has("optimum")


def is_quanto_available() -> bool:
    """Tell whether optimum's quanto is installed."""
    return _has("optimum") and _has("optimum.quanto")


def is_te_available() -> bool:
    """Tell whether NVIDIA's transformer engine is installed."""
    return _has("transformer_engine")


def is_torchao_available() -> bool:
    """Tell whether torchao is installed."""
    return _has("torchao")


def is_torchao_ge_v0_18_0() -> bool:
    """Tell whether torchao 0.18 or a later version is installed."""
    return is_torchao_available() and _reaches("torchao", "0.18.0")


def is_xpu_available() -> bool:
    """Tell whether torch finds an Intel GPU."""
    import torch

    return torch.xpu.is_available()


def is_torch_tpu_available() -> bool:
    """Tell whether torch_xla is installed."""
    return _has("torch_xla")


# Of transformers' versions, as peft names them; Veneer takes none before 5.0.
is_transformers_ge_v5 = _reaches("transformers", "5.0.0")
is_transformers_ge_v5_1_0 = _reaches("transformers", "5.1.0")
is_transformers_ge_v5_4_0 = _reaches("transformers", "5.4.0")
is_transformers_ge_v5_6_0 = _reaches("transformers", "5.6.0")
is_transformers_ge_v5_13_0 = _reaches("transformers", "5.13.0")
is_transformers_ge_v5_17_0 = _reaches("transformers", "5.17.0")
is_transformers_le_4_53 = False
