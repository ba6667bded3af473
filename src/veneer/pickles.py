"""Turning a pickled checkpoint into safetensors, on request only, and without running what is in it."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

from veneer.errors import CorruptFileError, NotACheckpointError, PickleRefusedError, SourceError
from veneer.files import written_whole
from veneer.source import ADAPTER_STEM, MODEL_STEM, PICKLES, SAFETENSORS, resolve, shards


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
        SourceError: the output is there already.
    """
    pickles, target = _find(Path(path))
    if out is not None:
        target = Path(out) if Path(out).suffix == SAFETENSORS else Path(out) / target.name
    if target.exists():
        raise SourceError(f"{target} is there already.", hint="Move it away, or name another with out= (--out).")
    tensors = {name: tensor for file in pickles for name, tensor in _read(file).items()}
    from safetensors.torch import save_file

    with written_whole(target) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    return target


def _find(path: Path) -> tuple[list[Path], Path]:
    """The pickles of one checkpoint, and the safetensors file that usually takes their place."""
    if path.suffix == SAFETENSORS and path.is_file():
        raise NotACheckpointError(f"{path} is no pickle: it is safetensors already.", hint="Use it as it is.")
    if path.is_file():
        stem = ADAPTER_STEM if path.name.startswith("adapter") else MODEL_STEM
        return [path], path.with_name(stem + SAFETENSORS)
    source = resolve(path, local_files_only=True)
    for stem, names in PICKLES.items():
        for name in names:
            if source.has(name):
                sharded = name.endswith(".index.json")
                return shards(source, name) if sharded else [source.path(name)], source.path(stem + SAFETENSORS)
    raise NotACheckpointError(
        f"{path} holds no pickled checkpoint.",
        hint=f"Looked for {', '.join(name for names in PICKLES.values() for name in names)}.",
    )


def _read(path: Path) -> dict[str, Any]:
    import torch

    try:
        with warnings.catch_warnings():
            # Torch remarks on the pickle's protocol; what matters is whether it can be read.
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
    if not isinstance(values, dict) or not all(isinstance(value, torch.Tensor) for value in values.values()):
        raise PickleRefusedError(
            f"{path} is no flat mapping of names to tensors.", hint="Save its state_dict alone where it was made."
        )
    # Views of one storage are written apart: safetensors holds no shared memory.
    return {str(name): tensor.contiguous().clone() for name, tensor in values.items()}


def _damaged(path: Path) -> CorruptFileError:
    return CorruptFileError(f"{path} is damaged, or no pickle.", hint="Copy or download it again.")
