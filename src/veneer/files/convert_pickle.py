"""Turns a pickled checkpoint into safetensors, on request only, and without running code that it holds."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.errors import (
    CorruptFileError,
    IncompleteCheckpointError,
    NotACheckpointError,
    OutputError,
    PickleRefusedError,
    UnsupportedError,
)
from veneer.files.atomic_write import atomic_write
from veneer.files.lookup_options import OFFLINE
from veneer.files.names import ADAPTER_STEM, MODEL_STEM, SAFETENSORS
from veneer.files.paths import exists
from veneer.files.resolve import local_path, resolve
from veneer.files.source import PICKLES
from veneer.files.weight_files import shards

if TYPE_CHECKING:
    from torch import Tensor


_SAVE_AGAIN = "Save its state_dict alone where it was made."


def convert_pickle(path: str | Path, out: str | Path | None = None) -> Path:
    """Write the tensors of a pickle as safetensors beside it.

    Only plain tensors are read (``torch.load(weights_only=True)``): a pickle that wants to run code is refused.

    Args:
        path: the pickle, or a checkpoint folder that holds one, whole or in shards; shards become one file.
        out: the .safetensors file to write, or a folder for it; by default the usual name in the same folder.

    Returns:
        The file that was written.

    Raises:
        PickleRefusedError: it holds more than tensors. CorruptFileError: it cannot be read.
        IncompleteCheckpointError: it holds no tensor. UnsupportedError: one that safetensors cannot hold.
        OutputError: the output is there already, or cannot be written.
    """
    pickles, target = _find(Path(path))
    if out is not None:
        target = Path(out) if Path(out).suffix == SAFETENSORS else Path(out) / target.name
    if exists(target):
        raise OutputError(f"{target} is there already.", hint="Move it away, or name another with out= (--out).")
    tensors = {name: tensor for file in pickles for name, tensor in read_pickle(file).items()}
    if not tensors:
        raise IncompleteCheckpointError(f"{path}: empty checkpoint: it holds no tensor.", hint=_SAVE_AGAIN)
    _write(tensors, target, path)
    return target


def _write(tensors: dict[str, Tensor], target: Path, path: str | Path) -> None:
    from safetensors.torch import save_file

    with atomic_write(target) as temporary:
        try:
            # Views of one storage are written apart: safetensors holds no shared memory.
            dense = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
            save_file(dense, temporary, metadata={"format": "pt"})
        except (KeyError, RuntimeError, ValueError) as error:  # what torch and safetensors make of odd tensors
            raise UnsupportedError(
                f"{path}: a tensor is sparse, quantised or of an unusual dtype, which safetensors cannot hold.",
                hint="Make it a plain dense tensor where it was made.",
            ) from error


def _find(path: Path) -> tuple[list[Path], Path]:
    """Find the pickles of one checkpoint, and name the safetensors file that usually takes their place."""
    path, is_file, _ = local_path(str(path), "path")
    if path.suffix == SAFETENSORS and is_file:
        raise NotACheckpointError(f"{path} is no pickle: it is safetensors already.", hint="Use it as it is.")
    if is_file:
        stem = ADAPTER_STEM if path.name.startswith("adapter") else MODEL_STEM
        return [path], path.with_name(stem + SAFETENSORS)
    source = resolve(path, OFFLINE)
    for stem, names in PICKLES.items():
        for name in names:
            if source.has(name):
                sharded = name.endswith(".index.json")
                return shards(source, name) if sharded else [source.path(name)], source.path(stem + SAFETENSORS)
    raise NotACheckpointError(
        f"{path} holds no pickled checkpoint.",
        hint=f"Looked for {', '.join(name for names in PICKLES.values() for name in names)}.",
    )


def read_pickle(path: Path, inside: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a pickle that holds nothing else.

    Args:
        path: the pickle.
        inside: the key of the mapping that has them, where the pickle has one.

    Raises:
        PickleRefusedError: it holds more. CorruptFileError: it cannot be read.
    """
    import torch

    try:
        with warnings.catch_warnings():
            # Torch warns about the pickle's protocol; all that matters is whether it can be read.
            warnings.simplefilter("ignore")
            values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise PickleRefusedError(
                f"{path} holds more than plain tensors, and reading that could run code.",
                hint="Save its state_dict alone where it was made, as safetensors.",
            ) from error
        raise _damaged(path) from error
    except Exception as error:  # bytes that are no pickle make the unpickler fail in any way it can
        raise _damaged(path) from error
    if inside is not None and isinstance(values, dict):
        values = values.get(inside, values)
    if not isinstance(values, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in values.items()
    ):
        raise PickleRefusedError(f"{path} is no flat mapping of names to tensors.", hint=_SAVE_AGAIN)
    return values


def _damaged(path: Path) -> CorruptFileError:
    return CorruptFileError(f"{path} is damaged, or no pickle.", hint="Copy or download it again.")
