"""What the start of each command imports, and what its options are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import click
import pytest

from veneer.cli.app import COMMANDS, application

# Command -> the function that gets the options which the command itself does not look at.
CALLED = {
    "inspect": "veneer.checkpoints.inspection.inspect_path.inspect",
    "check": "veneer.checkpoints.serving.check_serving",
    "generate": "veneer.peft_model.load.load",
    "train": "veneer.finetuning.supervised.train",
    "merge": "veneer.merging.merge_folder.merge",
    "convert": "veneer.peft_model.convert_to_lora.convert_to_lora",
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
    parameters = inspect.signature(callback).parameters
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
