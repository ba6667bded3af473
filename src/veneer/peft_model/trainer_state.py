"""What lets ``Trainer`` go on from its checkpoints, and back to the best one.

Trainer knows the models of one library as adapters, by their class. Any other model it restores with
``load_state_dict`` from ``model.safetensors``. So in its checkpoint folders (``checkpoint-500``), and only there, that
file holds the adapters' tensors as they are in memory; the base's are in none. They are there beside the saved adapter,
as the optimiser's state is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.checkpoints.checkpoint import apart
from veneer.files.adapter_folders import TRAINER_CHECKPOINT
from veneer.files.atomic_write import atomic_write

STATE = "model.safetensors"


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Name in ``state_dict()`` -> tensor, of all that is the adapters' own."""
    own = {id(t) for entry in model.adapters.by_name.values() for t in entry.tensors_by_place().values()}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in own}


def write_state(model: Any, folder: Path, given: Mapping[str, Tensor]) -> None:
    """Write the adapters' tensors for Trainer, where ``folder`` is a checkpoint of its.

    A model that is spread over processes is restored by Trainer's own ways.

    Args:
        model: the model.
        folder: where its adapters are saved.
        given: tensors that take the place of the model's, by their names.
    """
    if TRAINER_CHECKPOINT.fullmatch(folder.name) is None or model.adapters.is_spread:
        return
    from safetensors.torch import save_file

    tensors = {name: given.get(name, tensor) for name, tensor in adapter_state(model).items()}
    with atomic_write(folder / STATE) as temporary:
        save_file(apart(tensors), temporary, metadata={"format": "pt"})
