"""Writes the file from which ``Trainer`` resumes its checkpoints and returns to the best one.

Trainer recognises the adapters of peft, by their class, and restores any other model with ``load_state_dict``
from ``model.safetensors``. So in its checkpoint folders (``checkpoint-500``), and only there, that file is written
beside the saved adapter. It holds the adapters' tensors as they are in memory, and none of the base's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.checkpoints.checkpoint import apart
from veneer.files.adapter_folders import TRAINER_CHECKPOINT
from veneer.files.atomic_write import atomic_write
from veneer.peft_model.delegation import stands_for_peft

STATE = "model.safetensors"


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Return name in ``state_dict()`` -> tensor, for the tensors of all adapters."""
    ids = {id(t) for entry in model.adapters.by_name.values() for t in entry.tensors_by_place().values()}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in ids}


def write_state(model: Any, folder: Path, replacements: Mapping[str, Tensor]) -> None:
    """Write the adapters' tensors for Trainer, where ``folder`` is a checkpoint of its.

    Trainer restores a model that is spread over processes in its own way, and one that it takes for peft's (see
    ``veneer.as_peft``) from its adapters.

    Args:
        model: the model.
        folder: the folder in which its adapters are saved.
        replacements: tensors that take the place of the model's, by their names.
    """
    if TRAINER_CHECKPOINT.fullmatch(folder.name) is None or model.adapters.is_spread or stands_for_peft(model):
        return
    from safetensors.torch import save_file

    tensors = {name: replacements.get(name, tensor) for name, tensor in adapter_state(model).items()}
    with atomic_write(folder / STATE) as temporary:
        save_file(apart(tensors), temporary, metadata={"format": "pt"})
