"""Reads adapters of MLX-VLM up to 2026; later versions write the format of MLX-LM.

adapters.safetensors: <module>.A [in, r], <module>.B [r, out]
adapter_config.json: {"rank": 8, "alpha": 0.1, "dropout": 0.1}

The scale was alpha until March 2026, and alpha / rank since; the files do not say which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BaseModelError, CorruptFileError, UnsupportedError
from veneer.files.json_file import is_number
from veneer.files.names import ADAPTER_CONFIG
from veneer.files.source import Source
from veneer.formats.canonical import CanonicalAdapter
from veneer.formats.format import Base, ReadOptions, Step
from veneer.formats.mlx_names import LEAF, WEIGHTS, WRAPPED
from veneer.formats.mlx_tensors import by_module, change_of_module, choice, under_base_names
from veneer.formats.tensor_files import header_of, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

_FACTOR = re.compile(r".+\.[AB]")


class MlxVlmFormat:
    """An adapter of MLX-VLM, in the format before MLX-LM's."""

    name: ClassVar[str] = "mlx-vlm"
    title: ClassVar[str] = "MLX-VLM"
    reads: ClassVar[bool] = True
    writes: ClassVar[bool] = False

    def recognise(self, source: Source) -> bool:
        """Tell whether all tensors are factors with MLX-VLM's names."""
        header = header_of(source, WEIGHTS)
        return header is not None and bool(header.tensors) and all(map(_FACTOR.fullmatch, header.tensors))

    def read(self, source: Source, options: ReadOptions) -> Mapping[str, CanonicalAdapter]:
        """Read a folder, or a checkpoint of the training in it."""
        header = header_of(source, WEIGHTS)
        assert header is not None
        if options.base is None:
            raise BaseModelError(
                f"{source.origin}: MLX-VLM names modules otherwise than the model, which its config does not name.",
                hint="Give the base: --base",
            )
        config = source.json(ADAPTER_CONFIG)
        rank, scale = _rank_and_scale(config, options, source.origin)
        changes = {
            module: change_of_module(module, leaves, rank, scale, source.origin)
            for module, leaves in by_module(_as_mlx(read_tensors(header)), LEAF, source.origin).items()
        }
        return {"": CanonicalAdapter(under_base_names(changes, options.base, WRAPPED, source.origin))}

    def write(self, adapters: Mapping[str, CanonicalAdapter], target: Path, base: Base | None) -> list[Step]:
        """Refuse to write: MLX-VLM reads the format of MLX-LM."""
        raise UnsupportedError(
            "The old format of MLX-VLM is only read.", hint="Write MLX-LM's, which it reads: --to mlx"
        )


def _as_mlx(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by the keys that MLX-LM gives them."""
    return {re.sub(r"\.([AB])$", lambda m: f".lora_{m[1].lower()}", key): tensor for key, tensor in tensors.items()}


def _rank_and_scale(config: Mapping[str, Any], options: ReadOptions, origin: str) -> tuple[int, float]:
    rank, alpha = config.get("rank"), config.get("alpha", 0.1)
    if type(rank) is not int or rank < 1 or not is_number(alpha):
        raise CorruptFileError(
            f"{origin}/{ADAPTER_CONFIG} has rank {rank!r} and alpha {alpha!r}.",
            hint="MLX-VLM needs a whole number and a number there; copy the config from the training.",
        )
    is_divided = rank == 1 or choice(
        options.scaling,
        f"{origin} has alpha {alpha:g} and rank {rank}: MLX-VLM multiplied by alpha until March 2026 ({alpha:g}), and "
        f"by alpha / rank since ({alpha / rank:g}).",
    )
    return rank, float(alpha / rank if is_divided else alpha)
