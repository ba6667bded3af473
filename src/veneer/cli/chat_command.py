"""``veneer chat``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from veneer.cli import options as shared
from veneer.cli.generation_options import GenerationOptions, generation
from veneer.cli.options import PATH_OR_ID
from veneer.cli.terminal import decoding_stdin, print_warnings, progress
from veneer.errors import VeneerError
from veneer.printing import one_line, quiet

if TYPE_CHECKING:
    from veneer.cli.chat_session import ChatSession

_PATHS = "An adapter, a set of adapters or a model; then further adapters of the same base."


@click.command()
@click.argument("paths", metavar="PATH [ADAPTER]...", type=PATH_OR_ID, nargs=-1, required=True, help=_PATHS)
@shared.base
@generation(512)
@shared.revision
@shared.local_files_only
def chat(
    paths: tuple[str, ...],
    base: str | None,
    generation: GenerationOptions,
    dtype: str,
    device: str | None,
    revision: str | None,
    local_files_only: bool,
) -> None:
    """Talk with a model, and switch and compare its adapters meanwhile; /help lists how.

    Example: veneer chat path/to/adapter path/to/another --base path/to/base
    """
    with quiet() as warnings:
        with progress("loading"):
            from veneer.cli.chat_session import ChatSession
            from veneer.cli.load_generator import load_generator, seed_sampling
            from veneer.files.adapter_folders import free_name
            from veneer.files.lookup_options import LookupOptions

            lookup = LookupOptions(revision, local_files_only=local_files_only)
            generator = load_generator(
                paths[0],
                generation,
                device,
                base=base,
                adapter_name=free_name(paths[0], ()),
                dtype=dtype,
                revision=revision,
                local_files_only=local_files_only,
            )
            session = ChatSession(generator, lookup, generation.system, sys.stdin.isatty() and sys.stdout.isatty())
            first = session.selected
            for path in paths[1:]:
                session.load(path)
            session.choose(first or session.adapters[:1])
        report = generator.model.load_report
        print_warnings([*warnings, *(report.warnings if report else ())])
        warnings.clear()
        seed_sampling(generation.seed)
        _run(session, warnings)


def _run(session: ChatSession, warnings: list[str]) -> None:
    """Run line after line. On a terminal, one that is wrong is told and the chat goes on; in a pipe it ends."""
    from veneer.cli.slash_commands import run_line

    with suppress(EOFError):
        for line in _typed(session) if session.on_terminal else _piped():
            try:
                run_line(session, line)
            except VeneerError as error:
                if not session.on_terminal:
                    raise
                print(f"error: {one_line(str(error))}", file=sys.stderr)
            print_warnings(warnings)
            warnings.clear()


def _piped() -> Iterator[str]:
    with decoding_stdin():
        for line in sys.stdin:
            yield line.rstrip("\r\n")


def _typed(session: ChatSession) -> Iterator[str]:
    """Yield the lines that are typed; Ctrl-C drops a line, Ctrl-D ends."""
    _complete(session)
    print(f"{session.label}: ask, or /help. Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            yield input(f"{session.label}> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _complete(session: ChatSession) -> None:
    """Let the tab key complete commands and names of adapters, where Python has readline."""
    try:
        import readline
    except ImportError:
        return
    from veneer.cli.slash_commands import completions

    readline.set_completer_delims(" ")
    readline.set_completer(lambda text, index: dict(enumerate(completions(session, text))).get(index))
    readline.parse_and_bind("tab: complete")
