"""The application. Each command is a module beside this one, imported when it is called."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from veneer._version import __version__
from veneer.errors import did_you_mean
from veneer.printing import one_line

# Command -> the module with its function of the same name, in the order in which help lists them.
COMMANDS = {
    "inspect": "inspect_command",
    "generate": "generate_command",
    "chat": "chat_command",
    "serve": "serve_command",
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
    "export": "`veneer merge` writes a plain model folder, and `veneer convert` an adapter for another tool.",
}


_INTERRUPTED = 130


class _Commands(click.Group):
    """The group of all commands."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names in the order of the help."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Import a command."""
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"veneer.cli.{COMMANDS[name]}")
        command: click.Command = getattr(module, name.replace("-", "_"))
        command.short_help = (command.help or "").partition("\n")[0]
        for parameter in command.params:
            _name_value(parameter)
        return command

    def invoke(self, context: click.Context) -> Any:
        """Call the command that is meant. Click would print an empty line for an interruption."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            return _INTERRUPTED


def _name_value(parameter: click.Parameter) -> None:
    """Let help name an option's value by a word such as ``RANK`` in place of its type."""
    if isinstance(parameter, click.Option) and not parameter.is_flag and parameter.metavar is None:
        parameter.metavar = str(parameter.name).split("_")[-1].upper()


def _complete(context: click.Context, option: click.Parameter, shell: str | None) -> None:
    """Print the shell's script of completion, or install it."""
    if shell is None:
        return
    from veneer.cli import shell_completion

    print(shell_completion.run(str(option.name), "" if shell == _THIS_SHELL else shell))
    context.exit()


_THIS_SHELL = "this shell"
_completion: Any = {
    "metavar": "[SHELL]",
    "is_flag": False,
    "flag_value": _THIS_SHELL,
    "is_eager": True,
    "expose_value": False,
    "callback": _complete,
}


_SETTINGS: Any = {"help_option_names": ["-h", "--help"], "max_content_width": 120, "show_default": True}


@click.command(cls=_Commands, context_settings=_SETTINGS)
@click.version_option(__version__, message="veneer %(version)s", help="Print the version.")
@click.option("--install-completion", **_completion, help="Install completion for the current shell, or for SHELL.")
@click.option("--show-completion", **_completion, help="Show its script, to copy it or to change the installation.")
def application() -> None:
    """Load, inspect, run and merge fine-tuned adapters."""


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    name = arguments[0] if arguments else ""
    if name and not name.startswith("-") and name not in COMMANDS:
        question = did_you_mean(name, COMMANDS, lambda command: f"`veneer {command}`")
        hint = _ELSEWHERE.get(name) or question or f"There are: {', '.join(COMMANDS)}."
        return _refuse(f"There is no command {name!r}. {hint}")
    try:
        code = application.main(arguments or ["--help"], prog_name="veneer", standalone_mode=False)
    except click.ClickException as error:
        command_line = f"veneer {name}" if name in COMMANDS else "veneer"
        message = error.format_message()
        meant = " Further adapters follow --adapter." if name == "merge" and "extra argument" in message else ""
        end = "" if message.endswith((".", "?", ")")) else "."
        return _refuse(f"{message}{end}{meant} `{command_line} --help` lists the options.")
    if code == _INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _refuse(message: str) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr)
    return 2
