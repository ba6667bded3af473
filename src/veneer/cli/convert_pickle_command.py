"""``veneer convert-pickle``."""

from __future__ import annotations

from pathlib import Path

import click

from veneer.cli.options import A_PATH
from veneer.cli.terminal import for_stdout


@click.command()
@click.argument("path", type=A_PATH, help="A pickled checkpoint, or its folder.")
@click.option("--out", type=A_PATH, help="The .safetensors file to write, or a folder for it.")
def convert_pickle(path: Path, out: Path | None) -> None:
    """Turn a pickled checkpoint into safetensors, reading plain tensors only.

    Example: veneer convert-pickle path/to/adapter
    """
    from veneer.files import convert_pickle

    print(for_stdout(str(convert_pickle.convert_pickle(path, out))))
