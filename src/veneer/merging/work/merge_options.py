"""The options of a merge from disk to disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from veneer.checkpoints.model_class import dtype_of
from veneer.errors import UsageError
from veneer.files.torch_dtypes import DTYPES
from veneer.merging.base.weight_files import FLOATS, NAMES
from veneer.merging.work.file_layout import size_in_bytes
from veneer.merging.work.rounding import NEAREST
from veneer.printing import AsJson

_DTYPES = [str(DTYPES[name]).removeprefix("torch.") for name in FLOATS]


@dataclass(frozen=True)
class MergeOptions(AsJson):
    """The options of a merge, all of which the manifest records.

    Attributes:
        dtype: of the merged weights; ``"auto"`` keeps each tensor's.
        max_shard_size: bytes of tensors in one file; the base's division when ``None``.
        rounding: ``"nearest"`` or ``"stochastic"``.
        seed: of the stochastic rounding.
        dequantize: whether a quantised base is turned into plain numbers first.
        task: what the model is for; by default the adapter's task.
        strict: refuse adapters that do not fit.
    """

    dtype: str = "auto"
    max_shard_size: int | None = None
    rounding: str = NEAREST
    seed: int = 0
    dequantize: bool = False
    task: str | None = None
    strict: bool = True

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype of the merged weights; ``None`` where each tensor keeps its own."""
        return None if self.dtype == "auto" else dtype_of(self.dtype)


def merge_options(dtype: Any, max_shard_size: str | int | None, **others: Any) -> MergeOptions:
    """Make the options of a merge from a caller's arguments."""
    output_dtype = dtype_of(dtype)
    if output_dtype in ("auto", None):
        name = "auto"
    elif NAMES.get(output_dtype) in FLOATS:
        name = str(output_dtype).removeprefix("torch.")
    else:
        raise UsageError(f"dtype={dtype!r} is none of a model's weights.", hint=f"Known: auto, {', '.join(_DTYPES)}.")
    return MergeOptions(name, None if max_shard_size is None else size_in_bytes(max_shard_size), **others)
