"""Tells which process writes a training run, checks its folder, and finds its last checkpoint; imports no torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from veneer.errors import OutputError, UsageError
from veneer.files.adapter_folders import TRAINER_CHECKPOINT
from veneer.files.names import ADAPTER_CONFIG
from veneer.files.output_folder import check_output, check_writable
from veneer.files.paths import is_file, is_folder

# The file that a checkpoint of transformers' trainer has when it is whole.
_TRAINER_STATE = "trainer_state.json"


def is_main_process() -> bool:
    """Tell whether this process is the one that prints and writes, by the number that its launcher gives it."""
    return os.environ.get("RANK", "0") == "0"


def check_run_folder(out: Path, overwrite: bool, resume: bool) -> Path | None:
    """Return the checkpoint to go on from, where a run is to be resumed.

    Raises:
        OutputError: ``out`` holds something that is not to be replaced, or cannot be written.
        UsageError: there is no checkpoint to go on from.
    """
    if resume and overwrite:
        raise UsageError("A run is either resumed or overwritten.", hint="Leave out one of the two.")
    checkpoints = checkpoints_in(out)
    if resume:
        check_writable(out)
        if not checkpoints:
            raise UsageError(f"{out} holds no whole checkpoint to go on from.", hint="Leave out --resume (resume=).")
        return checkpoints[-1]
    if checkpoints and not overwrite:
        raise OutputError(
            f"{out} is not empty.", hint="Go on from its last checkpoint by --resume, or choose another folder."
        )
    check_output(out, overwrite)
    if is_folder(out) and any(out.iterdir()) and not (checkpoints or is_file(out / ADAPTER_CONFIG)):
        raise OutputError(f"{out} holds no adapter; it is not replaced.", hint="Choose another folder.")
    return None


def remove_checkpoints(out: Path) -> None:
    """Remove the checkpoints of an earlier run, from which this one could otherwise be resumed."""
    for path in checkpoints_in(out):
        shutil.rmtree(path)


def checkpoints_in(out: Path) -> list[Path]:
    """List the whole checkpoints in a folder, the latest last."""
    if not is_folder(out):
        return []
    whole = [
        path for path in out.iterdir() if TRAINER_CHECKPOINT.fullmatch(path.name) and is_file(path / _TRAINER_STATE)
    ]
    return sorted(whole, key=lambda path: int(path.name.rpartition("-")[2]))
