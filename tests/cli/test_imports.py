"""What the start of each command imports, and what its options are called."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest

import veneer
from veneer.cli.app import COMMANDS, application
from veneer.cli.generation_options import generation_options

TORCH = {"torch", "torchgen", "numpy", "tqdm", "typing_extensions"}
# Starts and what they import beside Python's library, at most.
STARTS: Mapping[str, set[str]] = {
    "--version": {"click"},
    "--help": {"click"},
    **{f"{command} --help": {"click"} for command in COMMANDS},
    "inspct": {"click"},
    "inspect {made}/adapter": {"click", "rich"},
    "inspect {made}/adapter --json": {"click"},
    "inspect {made}/base --json": {"click"},
    "inspect {tmp}/mlx --json": {"click"},
    "inspect {tmp}/out.gguf --json": {"click"},
    "digest {made}/base": {"click"},
    "merge {made}/adapter --out {tmp}/out --json": {"click", "blake3", *TORCH},
    "verify {tmp}/merged --no-logits --json": {"click", "blake3", *TORCH},
    "unmerge {tmp}/merged {made}/base --out {tmp}/base --json": {"click", "blake3", *TORCH},
}
# What loading does without, although it is installed: transformers imports what else it likes.
UNUSED = {"bitsandbytes", "datasets", "matplotlib", "peft", "pydantic", "rich", "trl", "typer"}
IMPORTED = """
import sys
from veneer.cli import main
code = main(sys.argv[1:])
print(code, *{name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names)
"""


def imported(command: str) -> set[str]:
    """Return the packages that a process of the command has imported at its end; there are more before its start."""
    run = subprocess.run([sys.executable, "-c", IMPORTED, *command.split()], capture_output=True, text=True, check=True)
    before = {"__main__", "__mp_main__", "_distutils_hack", "veneer"}
    code, *packages = run.stdout.splitlines()[-1].split()
    assert code == ("2" if command == "inspct" else "0"), run.stderr
    return set(packages) - before


@pytest.fixture(scope="module")
def tmp(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with ``merged/``, and an adapter in formats of other tools."""
    folder = tmp_path_factory.mktemp("imports")
    veneer.merge(made / "adapter", out=folder / "merged")
    for name, to in (("mlx", "mlx"), ("out.gguf", "gguf")):
        veneer.convert(made / "adapter", folder / name, to=to)
    return folder


@pytest.mark.parametrize("command", STARTS)
def test_a_command_imports_what_it_uses_alone(command: str, made: Path, tmp: Path) -> None:
    assert imported(command.format(made=made, tmp=tmp)) <= STARTS[command]


def test_generating_and_loading_import_what_they_use_alone(made: Path) -> None:
    assert imported(f"generate {made}/adapter --prompt w5 --max-new-tokens 2 --json") & UNUSED == set()


def test_the_hook_of_every_start_of_python_imports_nothing() -> None:
    hook = (Path(__file__).parents[2] / "src" / "veneer_as_peft.pth").read_text()
    code = f"import os, sys; before = set(sys.modules)\n{hook}\nprint(set(sys.modules) - before)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# Command -> the function that gets the options which the command itself does not look at.
CALLED = {
    "inspect": "veneer.checkpoints.inspection.inspect_path.inspect",
    "check": "veneer.checkpoints.serving.check_serving",
    "generate": "veneer.peft_model.load.load",
    "serve": "veneer.serving.server_options.server_options",
    "train": "veneer.finetuning.supervised.train",
    "merge": "veneer.merging.merge_folder.merge",
    "convert": "veneer.peft_model.convert.convert",
    "combine": "veneer.merging.combine_folders.combine",
    "verify": "veneer.merging.verify.verify",
    "unmerge": "veneer.merging.output.unmerge.unmerge",
    "extract": "veneer.merging.extract_lora.extract",
    "bench": "veneer.benching.run.bench",
    "demo": "veneer.demo.script.main",
}


def command_of(name: str) -> click.Command:
    command = application.get_command(click.Context(application), name)
    assert command is not None
    return command


def passed_on(command: click.Command) -> Iterator[str]:
    callback: Callable[..., Any] | None = command.callback
    assert callback is not None
    parameters = {*inspect.signature(callback).parameters}
    if "generation" in parameters:  # which is made of several options
        parameters |= {*inspect.signature(generation_options).parameters}
    yield from (str(p.name) for p in command.params if p.name not in parameters and p.expose_value)


def keywords(path: str) -> set[str]:
    module, _, function = path.rpartition(".")
    parameters = inspect.signature(getattr(import_module(module), function)).parameters
    others = keywords(CALLED["generate"]) if "load_options" in parameters else set()
    return {*parameters, *others}


@pytest.mark.parametrize("name", COMMANDS)
def test_options_that_are_passed_on_are_keywords_of_what_is_called(name: str) -> None:
    names = set(passed_on(command_of(name)))
    assert bool(names) == (name in CALLED)
    if names:
        assert names <= keywords(CALLED[name])
