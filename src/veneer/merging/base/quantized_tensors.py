"""Finds the quantised tensors of a checkpoint, and dequantises them.

float8                 NAME, NAME_scale_inv or NAME_scale: one, a row's each, or one a block (weight_block_size)
bitsandbytes, 4 bits   NAME (two values a byte), NAME.absmax (the scale of each block), NAME.quant_map,
                       NAME.quant_state.bitsandbytes__nf4 or __fp4 (JSON: shape, size of a block);
                       scales that are quantised too have NAME.nested_absmax and NAME.nested_quant_map
bitsandbytes, 8 bits   LAYER.weight, LAYER.SCB (a row's scale, times 127), LAYER.weight_format (0: by rows)
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import CorruptFileError, MergeError, UnsupportedError
from veneer.files.base_config import part_of
from veneer.files.names import MODEL_CONFIG
from veneer.files.source import Source
from veneer.merging.base.weight_files import FLOATS, WeightFiles
from veneer.packages import require

_SCALES = ("_scale_inv", "_scale")
# The block of fp8 where a config names none.
_BLOCK = (128, 128)
_STATES = {f".quant_state.bitsandbytes__{kind}": kind for kind in ("nf4", "fp4")}
_BLOCK_SIZES = tuple(1 << n for n in range(5, 13))


@dataclass(frozen=True)
class Packed(ABC):
    """A quantised tensor.

    Attributes:
        shape: of its values.
        parts: the tensors that belong to it, such as scales; the output has none of them.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]

    @abstractmethod
    def values(self, files: WeightFiles, name: str) -> Tensor:
        """Read and dequantise its values, shape ``shape``, in float32."""


@dataclass(frozen=True)
class Float8(Packed):
    """float8 values and their scales, the first of ``parts``.

    Attributes:
        scales: the shape in which the scales are seen.
        step: rows and columns that share a scale; ``None`` where all values share one.
    """

    scales: tuple[int, ...]
    step: tuple[int, int] | None

    def values(self, files: WeightFiles, name: str) -> Tensor:
        scale = files.read(self.parts[0]).float().view(self.scales)
        if not scale.isfinite().all():
            raise CorruptFileError(
                f"{self.parts[0]} holds NaN or infinite scales.", hint="Use another copy of the base."
            )
        return dequantized(files.read(name), scale, self.step)


@dataclass(frozen=True)
class Bits8(Packed):
    """int8 values of bitsandbytes, a scale a row: the first of ``parts``."""

    def values(self, files: WeightFiles, name: str) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        matrix: Tensor = int8_vectorwise_dequant(files.read(name), files.read(self.parts[0]))
        return matrix


@dataclass(frozen=True)
class Bits4(Packed):
    """Blocks of 4-bit values of bitsandbytes, a scale a block.

    Attributes:
        kind: ``"nf4"`` or ``"fp4"``.
        block: values that share a scale.
        nested: how many scales share one, and the offset added to each; ``None`` where scales are plain.
    """

    kind: str
    block: int
    nested: tuple[int, float] | None

    def values(self, files: WeightFiles, name: str) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        # The values in one column, since one row is taken for a transpose.
        data = files.read(name).view(-1).view(torch.uint8).view(-1, 1)
        state = QuantState(
            self._scales(files, name),
            torch.Size(self.shape),
            blocksize=self.block,
            quant_type=self.kind,
            dtype=torch.float32,
        )
        matrix: Tensor = dequantize_4bit(data, state)
        return matrix

    def _scales(self, files: WeightFiles, name: str) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        scales = files.read(f"{name}.absmax")
        if self.nested is None:
            return scales
        block, offset = self.nested
        of_scales, code = files.read(f"{name}.nested_absmax"), files.read(f"{name}.nested_quant_map")
        plain: Tensor = dequantize_blockwise(scales, absmax=of_scales, code=code, blocksize=block)
        return plain + offset


@dataclass(frozen=True)
class Transposed(Packed):
    """A tensor that is stored as the transpose of the model's parameter."""

    of: Packed

    def values(self, files: WeightFiles, name: str) -> Tensor:
        return self.of.values(files, name).T.contiguous()


def dequantized(tensor: Tensor, scale: Tensor, step: tuple[int, int] | None) -> Tensor:
    """Multiply float8 values by their scales, in float32.

    Args:
        tensor: ``(..., rows, columns)``.
        scale: of as many dimensions, or one value.
        step: rows and columns that share a scale; the last block may be cut off.
    """
    if step is not None:
        for dimension, (count, size) in enumerate(zip(step, tensor.shape[-2:], strict=True), start=-2):
            if scale.shape[dimension] > 1:
                scale = scale.repeat_interleave(count, dimension).narrow(dimension, 0, size)
    return tensor.float() * scale


# -- which tensors are quantised -------------------------------------------------------------------------------


def packed_tensors(source: Source, files: WeightFiles, dequantize: bool) -> dict[str, Packed]:
    """Find the quantised tensors of a base, by name; none for a base that is not quantised.

    Raises:
        MergeError: the base is quantised, and ``dequantize`` is off. UnsupportedError: its method is unknown here.
        CorruptFileError: a tensor's scales are missing or of another size.
    """
    config = source.json(MODEL_CONFIG)
    text = part_of(config, "text_config", source.origin)
    quantized = part_of(config, "quantization_config", source.origin) or part_of(
        text, "quantization_config", source.origin
    )
    narrow = [name for name, place in files.places.items() if place.info.dtype.startswith("F8_E")]
    narrow = [name for name in narrow if not name.endswith(_SCALES)]
    if not quantized and not narrow:
        return {}
    method = _method(quantized) if quantized else "float8"
    if not dequantize:
        raise MergeError(
            f"The base {source.origin} is quantised ({method}); a merged weight does not fit into that form.",
            hint="Merge into the original base, or dequantise this one: --dequantize (dequantize=True).",
        )
    if method in ("fp8", "float8", "fbgemm_fp8"):
        block = _block_of(quantized)
        return {name: _float8(files, name, block) for name in narrow}
    if method == "bitsandbytes":
        return _bitsandbytes(source, files)
    in_memory = method in ("torchao", "hqq")
    raise UnsupportedError(
        f"The base {source.origin} is quantised as {method}, which a merge from disk to disk cannot undo.",
        hint='Merge it in memory: veneer.load(ADAPTER, base=BASE, merge=True, into="dequantized").save_pretrained(OUT).'
        if in_memory
        else "Merge into the original base, which this one was quantised from.",
    )


def _method(quantized: Mapping[str, Any]) -> str:
    """Return the name of a config's method; early configs of bitsandbytes have none."""
    early = quantized.get("load_in_4bit") or quantized.get("load_in_8bit")
    return str(quantized.get("quant_method", "bitsandbytes" if early else "?"))


def _block_of(quantized: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns of a block that shares a scale; ``None`` where a config rules blocks out."""
    block = quantized.get("weight_block_size", _BLOCK)
    if block is None:
        return None
    if not isinstance(block, (list, tuple)) or [type(n) for n in block] != [int, int] or min(block) < 1:
        raise CorruptFileError(
            f"The base's weight_block_size={block!r} is not two numbers.", hint="Copy or download the base again."
        )
    return block[0], block[1]


def _float8(files: WeightFiles, name: str, block: tuple[int, int] | None) -> Float8:
    part = next((name + end for end in _SCALES if name + end in files), None)
    if part is None:
        raise UnsupportedError(f"{name} is stored in 8 bits and has no scales.", hint="Use another copy of the base.")
    shape, scales, dtype = files.shape(name), files.shape(part), files.places[part].info.dtype
    seen, step = _scaled(shape, scales, block)
    if seen is None or dtype not in (*FLOATS, "F8_E8M0"):
        blocks = "" if block is None else f", its blocks of {block[0]} x {block[1]}"
        raise CorruptFileError(
            f"{part} is {list(scales)} of {dtype}, and no scales of {name}, {list(shape)}: neither one, nor its rows'"
            f"{blocks}.",
            hint="Copy or download the base again, or use another copy of it.",
        )
    return Float8(shape, (part,), seen, step)


def _scaled(
    shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[tuple[int, ...] | None, tuple[int, int] | None]:
    """Return the shape in which scales are seen, and the rows and columns that share one; ``None`` for a misfit."""
    if math.prod(scales) == 1:
        return (), None
    if len(shape) < 2:
        return None, None
    *stack, rows, columns = shape
    if len(scales) == 1:
        scales = (*scales, 1) if not stack else (*scales, 1, 1)
    forms = {(*stack, rows, 1): (1, columns)}
    if stack:  # experts, each of them scaled, or their columns
        forms |= {(*stack, 1, 1): (rows, columns), (*stack, 1, columns): (rows, 1)}
    if block is not None:
        forms.setdefault((*stack, -(-rows // block[0]), -(-columns // block[1])), block)
    return (scales, forms[scales]) if scales in forms else (None, None)


def _bitsandbytes(source: Source, files: WeightFiles) -> dict[str, Packed]:
    tensors: dict[str, Packed] = {}
    require(f"The base {source.origin}, which is quantised by bitsandbytes,", "bitsandbytes", extra="quant")
    for part in files.places:
        name, end = next(((part.removesuffix(end), end) for end in _STATES if part.endswith(end)), (part, ""))
        if end:
            tensors[name] = _bits4(files, name, part, _STATES[end])
        elif part.endswith(".SCB"):
            name = part.removesuffix("SCB") + "weight"
            tensors[name] = _bits8(files, name, part)
    return tensors


def _bits8(files: WeightFiles, name: str, scale: str) -> Bits8:
    form = name + "_format"
    if form in files:
        _expect(files, form, "U8", 1)
        if files.read(form).item():
            raise UnsupportedError(
                f"{name} is in a layout of bitsandbytes for one kind of GPU ({form}).",
                hint="Use another copy of the base.",
            )
    _expect(files, name, "I8")
    if len(files.shape(name)) != 2:
        raise _damaged(name)
    _expect(files, scale, "F32", files.shape(name)[0])
    return Bits8(files.shape(name), (scale, form) if form in files else (scale,))


def _bits4(files: WeightFiles, name: str, state: str, kind: str) -> Bits4:
    try:
        values = json.loads(files.read(state).numpy().tobytes())
        shape, block = tuple(map(int, values["shape"])), int(values["blocksize"])
        is_nested = "nested_blocksize" in values
        nested = (int(values["nested_blocksize"]), float(values["nested_offset"])) if is_nested else None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise _damaged(state) from error
    if {block, nested[0] if nested else block} - set(_BLOCK_SIZES) or len(shape) != 2 or min(shape) < 1:
        raise _damaged(state)
    scales = -(-math.prod(shape) // block)
    if name not in files or files.places[name].info.nbytes != -(-math.prod(shape) // 2):
        raise _damaged(name)
    _expect(files, f"{name}.absmax", "U8" if nested else "F32", scales)
    _expect(files, f"{name}.quant_map", "F32", 16)
    if not torch.allclose(files.read(f"{name}.quant_map"), _code(kind), atol=1e-6):
        raise UnsupportedError(
            f"{name}: its 16 values ({name}.quant_map) are not those of {kind}.", hint="Use another copy of the base."
        )
    if nested:
        _expect(files, f"{name}.nested_absmax", "F32", -(-scales // nested[0]))
        _expect(files, f"{name}.nested_quant_map", "F32", 256)
    parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")[: 4 if nested else 2]
    return Bits4(shape, (state, *(f"{name}.{part}" for part in parts)), kind, block, nested)


@cache
def _code(kind: str) -> Tensor:
    """Return the values that bitsandbytes computes with for the 16 codes of a kind, whatever the file says."""
    from bitsandbytes.functional import get_4bit_type

    values: Tensor = get_4bit_type(kind, device="cpu")
    return values


def _expect(files: WeightFiles, name: str, dtype: str, numel: int | None = None) -> None:
    info = files.places[name].info if name in files else None
    if info is None or info.dtype != dtype or (numel is not None and info.numel != numel):
        raise _damaged(name)


def _damaged(name: str) -> CorruptFileError:
    return CorruptFileError(
        f"The base's {name} is missing, or is not what bitsandbytes writes.", hint="Copy or download the base again."
    )


def as_in_model(packed: Mapping[str, Packed], model: nn.Module, direct: Mapping[str, str]) -> dict[str, Packed]:
    """Orient quantised tensors as the model's layers have them; ``direct``: parameter -> stored tensor."""
    oriented = dict(packed)
    for parameter, name in direct.items():
        layer = type(model.get_submodule(parameter.rpartition(".")[0])).__name__
        # Quantised, GPT-2's layers become ordinary linear ones, whose weights lie the other way.
        if layer == "Conv1D" and isinstance(packed.get(name), (Bits4, Bits8)):
            oriented[name] = Transposed(packed[name].shape[::-1], packed[name].parts, packed[name])
    return oriented
