"""``veneer convert-pickle``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.terminal import for_stdout


def convert_pickle(
    path: Annotated[Path, typer.Argument(help="A pickled checkpoint, or its folder.")],
    out: Annotated[Path | None, typer.Option(help="The .safetensors file to write, or a folder for it.")] = None,
) -> None:
    """Turn a pickled checkpoint into safetensors, reading plain tensors only.

    Example: veneer convert-pickle path/to/adapter
    """
    from veneer.files import convert_pickle

    print(for_stdout(str(convert_pickle.convert_pickle(path, out))))
