"""The typer application. Each command is a module beside this one, imported when it is called.

Only the command that is called is built: typer prepares every option of every command that it knows, and that
alone would take longer than ``veneer inspect`` may.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from veneer._version import __version__
from veneer.errors import did_you_mean
from veneer.printing import one_line

# Command -> the module with its function of the same name, in the order in which help lists them.
COMMANDS = {
    "inspect": "inspect_command",
    "generate": "generate_command",
    "chat": "chat_command",
    "train": "train_command",
    "merge": "merge_command",
    "convert": "convert_command",
    "combine": "combine_command",
    "check": "check_command",
    "verify": "verify_command",
    "unmerge": "unmerge_command",
    "extract": "extract_command",
    "bench": "bench_command",
    "demo": "demo_command",
    "convert-pickle": "convert_pickle_command",
    "digest": "digest_command",
}

# What other tools have as a command -> what does it here.
_ELSEWHERE = {
    "serve": "Any server takes the folder that `veneer merge` writes; `veneer check ADAPTER --for vllm` tells whether "
    "vLLM takes the adapter itself.",
    "export": "`veneer merge` writes a plain model folder, and `veneer convert` a plain LoRA.",
}

# The exit code that typer returns when it caught the interruption itself.
_INTERRUPTED = 130


def _with_words(parameters: list[Any]) -> list[Any]:
    """Let help name a value by a word such as ``RANK`` in place of its Python type; a switch has none."""
    for parameter in parameters:
        if parameter.metavar is None:
            parameter.metavar = "" if getattr(parameter, "is_flag", False) else parameter.name.split("_")[-1].upper()
        if parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: None  # beside its name, which typer shows anyway
    return parameters


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> Any:
        return _with_words(super().get_params(ctx))


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> Any:
        return _with_words(super().get_params(ctx))


def build(names: list[str]) -> typer.Typer:
    """Build the application with these commands."""
    app = typer.Typer(
        name="veneer",
        cls=_Group,
        help="Load, inspect, run and merge fine-tuned adapters.",
        no_args_is_help=True,
        # Its options are the application's: a command that is called alone need not prepare them.
        add_completion=len(names) > 1,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for name in names:
        module = importlib.import_module(f"veneer.cli.{COMMANDS[name]}")
        app.command(name, cls=_Command)(getattr(module, name.replace("-", "_")))
    return app


def _version(show: bool) -> None:
    if show:
        print(f"veneer {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    name = arguments[0] if arguments else ""
    if name and not name.startswith("-") and name not in COMMANDS:
        question = did_you_mean(name, COMMANDS, lambda command: f"`veneer {command}`")
        hint = _ELSEWHERE.get(name) or question or f"There are: {', '.join(COMMANDS)}."
        return _refuse(f"There is no command {name!r}. {hint}")
    command = typer.main.get_command(build([name] if name in COMMANDS else list(COMMANDS)))
    try:
        code = command.main(arguments or ["--help"], prog_name="veneer", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        # An error of usage from typer: its class moved between versions, its method did not.
        if not hasattr(error, "format_message"):
            raise
        command_line = f"veneer {name}" if name in COMMANDS else "veneer"
        message = error.format_message().rstrip(".")
        meant = "Further adapters follow --adapter. " if name == "merge" and "extra argument" in message else ""
        return _refuse(f"{message}. {meant}`{command_line} --help` lists the options.")
    if code == _INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _refuse(message: str) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr)
    return 2
