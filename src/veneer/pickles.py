"""Turning a pickled checkpoint into safetensors, on request only, and without running what is in it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from veneer.errors import CorruptFileError, NotACheckpointError, PickleRefusedError, SourceError
from veneer.files import written_whole
from veneer.source import ADAPTER_STEM, MODEL_STEM, PICKLES, SAFETENSORS, resolve


def convert_pickle(path: str | Path, out: str | Path | None = None) -> Path:
    """Write the tensors of a pickle as safetensors beside it.

    Only plain tensors are read (``torch.load(weights_only=True)``): a pickle that wants to run code is refused.

    Args:
        path: the pickle, or a checkpoint folder that holds one.
        out: the file to write; by default the usual name in the same folder.

    Returns:
        The file that was written.

    Raises:
        PickleRefusedError: it holds more than tensors. CorruptFileError: it cannot be read.
        SourceError: the output is there already.
    """
    source, stem = _find(Path(path))
    target = Path(out) if out is not None else source.with_name(stem + SAFETENSORS)
    if target.exists():
        raise SourceError(f"{target} is there already.", hint="Move it away, or give another --out.")
    tensors = _read(source)
    from safetensors.torch import save_file

    with written_whole(target) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    return target


def _find(path: Path) -> tuple[Path, str]:
    if path.is_file():
        return path, ADAPTER_STEM if path.name.startswith("adapter") else MODEL_STEM
    folder = resolve(path, local_files_only=True).root
    for stem, names in PICKLES.items():
        for name in names:
            if (folder / name).is_file() and not name.endswith(".json"):
                return folder / name, stem
    raise NotACheckpointError(
        f"{path} holds no pickled checkpoint.",
        hint=f"Looked for {', '.join(n for ns in PICKLES.values() for n in ns)}.",
    )


def _read(path: Path) -> dict[str, Any]:
    import torch

    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise PickleRefusedError(
                f"{path} holds more than plain tensors, and reading that could run code.",
                hint="Save its state_dict alone where it was made, as safetensors.",
            ) from error
        raise CorruptFileError(f"{path} is damaged, or no pickle.", hint="Copy or download it again.") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CorruptFileError(f"{path} is damaged, or no pickle.", hint="Copy or download it again.") from error
    if not isinstance(values, dict) or not all(isinstance(v, torch.Tensor) for v in values.values()):
        raise PickleRefusedError(
            f"{path} is no flat mapping of names to tensors.", hint="Save its state_dict alone where it was made."
        )
    # Views of one storage are written apart: safetensors holds no shared memory.
    return {str(name): tensor.contiguous().clone() for name, tensor in values.items()}
