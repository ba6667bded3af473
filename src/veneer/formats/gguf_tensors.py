"""Reads and writes the tensors of GGUF adapters, and brings their rows into the base's order or llama.cpp's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFType, GGUFValueType, GGUFWriter, Keys
from gguf.quants import dequantize
from torch import Tensor

from veneer.errors import CorruptFileError, UnsupportedError
from veneer.files.gguf_header import GgufHeader, GgufTensor
from veneer.files.json_file import COPY_AGAIN
from veneer.formats.canonical import ModuleChange
from veneer.formats.experts import ExpertStack, both, change_of, halves, stack_of
from veneer.formats.gguf_weights import EMBEDDING, FACTORS, ROUTER, Weight

_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def read_tensors(header: GgufHeader) -> dict[str, Tensor]:
    """Read all tensors of a file; of quantised ones the values, in float32.

    Raises:
        CorruptFileError: one is cut off, or of a type that is not known. UnsupportedError: gguf cannot read its type.
    """
    data = numpy.memmap(header.path, mode="r")
    return {name: _read(tensor, header, data) for name, tensor in header.tensors.items()}


def _read(tensor: GgufTensor, header: GgufHeader, data: Any) -> Tensor:
    """Read a tensor, after a check that the file holds it, and before any memory is taken for it."""
    kinds = [kind for kind in GGMLQuantizationType if kind == tensor.kind]
    if not kinds:
        raise CorruptFileError(
            f"{header.path} is damaged: {tensor.name!r} has the unknown type {tensor.kind}.", hint=COPY_AGAIN
        )
    values, nbytes = GGML_QUANT_SIZES[kinds[0]]
    *rows, row = tensor.shape
    end = tensor.start + math.prod(tensor.shape) // values * nbytes
    if row % values or end > header.size:
        raise CorruptFileError(f"{header.path} is damaged: {tensor.name!r} is cut off.", hint=COPY_AGAIN)
    stored = numpy.array(data[tensor.start : end]).reshape(*rows, row // values * nbytes)
    if kinds[0] in _DTYPES:
        return torch.from_numpy(stored).view(_DTYPES[kinds[0]])
    try:
        return torch.from_numpy(dequantize(stored, kinds[0]))
    except NotImplementedError as error:
        raise UnsupportedError(
            f"{header.path}: {tensor.name!r} is of the type {kinds[0].name}, which the package gguf cannot read.",
            hint="Write the adapter again as F32, F16, BF16 or Q8_0.",
        ) from error


def changes_of(weights: Iterable[Weight], tensors: Mapping[str, Tensor], alpha: float) -> list[ModuleChange]:
    """Return the changes of the base's parameters that a file's factors mean.

    Args:
        weights: the weights that have factors.
        tensors: the file's tensors.
        alpha: the file's alpha; 0 means a scale of 1.
    """
    by_parameter: dict[str, list[Weight]] = {}
    for weight in weights:
        by_parameter.setdefault(weight.parameter, []).append(weight)
    return [_change(parts, tensors, alpha) for parts in by_parameter.values()]


def _change(weights: list[Weight], tensors: Mapping[str, Tensor], alpha: float) -> ModuleChange:
    """Return the change of a parameter, given the weights that it is: one, or one or both of experts' gate and up."""
    weight = weights[0]
    if len(weight.shape) == 3:
        stacks = {each.half: ExpertStack(*_factors(each, tensors, alpha)) for each in weights}
        stack = stacks[None] if None in stacks else both(stacks.get(0), stacks.get(1), weight.interleaved)
        return change_of(weight.parameter, stack)
    down, up, scale = _factors(weight, tensors, alpha)
    path, rank = weight.parameter.removesuffix(".weight"), up.shape[1]
    if weight.name == EMBEDDING:
        leaves = {"lora_embedding_A": down.T.contiguous(), "lora_embedding_B": up}
        return ModuleChange(path, "LORA", leaves, rank, scale)
    # A router is no linear layer in transformers, so that PEFT names its parameter.
    is_parameter = weight.kind == ROUTER
    leaves = {"lora_A.weight": down, "lora_B.weight": up}
    return ModuleChange(weight.parameter if is_parameter else path, "LORA", leaves, rank, scale, is_parameter)


def _factors(weight: Weight, tensors: Mapping[str, Tensor], alpha: float) -> tuple[Tensor, Tensor, float]:
    """Return the factors of a weight, their rows in the base's order, and their scale."""
    down, up = (tensors[weight.name + ending] for ending in FACTORS)
    if weight.heads:
        up = half_a_head_apart(up, weight.heads)
    return down, up, alpha / up.shape[-1] if alpha else 1.0


def tensors_of(change: ModuleChange, weight: Weight) -> dict[str, Tensor]:
    """Return the tensors of a change for a weight of its parameter, by their names in a file."""
    leaves = change.leaves
    if len(weight.shape) == 3:
        stack = stack_of(change)
        part = stack if weight.half is None else halves(stack, weight.interleaved)[weight.half]
        factors = part.down, part.up
    elif weight.name == EMBEDDING:
        factors = leaves["lora_embedding_A"].T, leaves["lora_embedding_B"]
    else:
        up = leaves["lora_B.weight"]
        factors = leaves["lora_A.weight"], side_by_side(up, weight.heads) if weight.heads else up
    return {weight.name + ending: factor for ending, factor in zip(FACTORS, factors, strict=True)}


def side_by_side(up: Tensor, heads: int) -> Tensor:
    """Bring the two rows that a rotation turns together side by side, from half a head apart."""
    return up.reshape(heads, 2, -1, up.shape[-1]).transpose(1, 2).reshape(up.shape)


def half_a_head_apart(up: Tensor, heads: int) -> Tensor:
    """Bring the two rows that a rotation turns together half a head apart, from side by side."""
    return up.reshape(heads, -1, 2, up.shape[-1]).transpose(1, 2).reshape(up.shape)


def write_file(
    path: Path,
    architecture: str,
    alpha: float,
    tokens: list[int] | None,
    texts: Mapping[str, str],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write an adapter.

    Args:
        path: the file.
        architecture: the base's.
        alpha: what is divided by the rank of each pair of factors.
        tokens: where an aLoRA begins to act.
        texts: more values by their keys.
        tensors: the factors by their names.
    """
    writer = GGUFWriter(path, architecture)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    if tokens:
        writer.add_key_value(Keys.Adapter.ALORA_INVOCATION_TOKENS, tokens, GGUFValueType.ARRAY, GGUFValueType.UINT32)
    for key, text in texts.items():
        writer.add_string(key, text)
    for name, tensor in tensors.items():
        _add_tensor(writer, name, tensor.detach().cpu().contiguous())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_tensor(writer: GGUFWriter, name: str, tensor: Tensor) -> None:
    """Add a tensor in its own dtype; one that GGUF files do not have becomes float32."""
    if tensor.dtype == torch.bfloat16:  # which numpy does not have
        writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=GGMLQuantizationType.BF16)
    else:
        kept = tensor if tensor.dtype in (torch.float32, torch.float16) else tensor.float()
        writer.add_tensor(name, kept.numpy())
