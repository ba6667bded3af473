"""The commands that a chat takes between two messages, such as ``/adapter NAME``."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from veneer.cli.chat_session import ChatSession
from veneer.errors import UsageError, did_you_mean
from veneer.printing import one_line


@dataclass(frozen=True)
class SlashCommand:
    """A command of the chat.

    Attributes:
        usage: what may follow its name.
        help: one line on it.
        run: gets the session and the words.
        words: the least and the largest number of words; ``None`` for all that follows, as one text.
    """

    usage: str
    help: str
    run: Callable[..., object]
    words: tuple[int, int] | None


def _adapter(session: ChatSession, *names: str) -> None:
    if names:
        session.choose(names)
        return
    for name in session.adapters:
        method = session.generator.model.peft_config[name].peft_type
        print(f"{'*' if name in session.selected else ' '} {one_line(name)}  {one_line(str(method))}")
    print(f"{' ' if session.selected else '*'} base")


def _save(session: ChatSession, file: str) -> None:
    session.save(Path(file).expanduser())


def _help(session: ChatSession) -> None:
    usages = {f"/{name} {command.usage}".rstrip(): command.help for name, command in COMMANDS.items()}
    for usage, text in usages.items():
        print(f"{usage:{max(map(len, usages))}}  {text}")
    print("Ctrl-C stops an answer; Ctrl-D ends; a message that begins with / is written with two.")


def _quit(session: ChatSession) -> None:
    raise EOFError


_MANY = 1000
COMMANDS: dict[str, SlashCommand] = {
    "adapter": SlashCommand(
        "[NAME...]", "Switch to an adapter, or several at once; without a name, list them.", _adapter, (0, _MANY)
    ),
    "base": SlashCommand("", "Have the base answer alone.", lambda session: session.choose([]), (0, 0)),
    "compare": SlashCommand(
        "[A B...]",
        "Answer the last question (or the next) by these, or by all, side by side.",
        lambda session, *names: session.compare(names),
        (0, _MANY),
    ),
    "system": SlashCommand("[TEXT]", "Set the system message, or remove it.", ChatSession.set_system, None),
    "reset": SlashCommand("", "Forget the conversation.", ChatSession.reset, (0, 0)),
    "load": SlashCommand("PATH [NAME]", "Load another adapter, and switch to it.", ChatSession.load, (1, 2)),
    "save": SlashCommand("FILE", "Write the conversation as a line that `veneer train` reads.", _save, (1, 1)),
    "help": SlashCommand("", "List the commands.", _help, (0, 0)),
    "quit": SlashCommand("", "End.", _quit, (0, 0)),
}


def run_line(session: ChatSession, line: str) -> None:
    """Run a line: a command where it begins with a slash, else a message.

    Raises:
        EOFError: the chat is to end. VeneerError: the line asks for what is not there, or cannot be answered.
    """
    if line.startswith("/") and not line.startswith("//"):
        _run_command(session, *line[1:].partition(" ")[::2])
    elif line.strip():
        session.ask(line.removeprefix("/") if line.startswith("/") else line)


def _run_command(session: ChatSession, name: str, rest: str) -> None:
    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS, "/{}".format)
        raise UsageError(f"There is no command /{name}.", hint=f"{near}/help lists them.")
    command = COMMANDS[name]
    words = [rest.strip()] if command.words is None else _split(rest)
    least, most = command.words or (0, 1)
    if not least <= len(words) <= most:
        raise UsageError(f"/{name} takes {command.usage or 'nothing more'}.", hint="/help lists the commands.")
    command.run(session, *words)


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{text.strip()!r} cannot be split into words: {error}.", hint="Close the quotes.") from error


def completions(session: ChatSession, text: str) -> list[str]:
    """Return the commands, and the names of adapters, that begin with a text."""
    words = [f"/{name}" for name in COMMANDS] + session.adapters
    return [f"{word} " for word in words if text and word.startswith(text)]
