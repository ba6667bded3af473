"""Holds the conversation of ``veneer chat``: its messages, and the adapters that answer."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from veneer.cli.text_generator import Message, TextGenerator, system_message
from veneer.errors import UsageError
from veneer.files import adapter_folders
from veneer.files.atomic_write import atomic_write
from veneer.files.lookup_options import LookupOptions
from veneer.files.paths import exists
from veneer.files.resolve import resolve
from veneer.patches.selection import BASE
from veneer.printing import one_line, printable_prose

# The seconds between two pictures of answers that come side by side.
_BETWEEN_PICTURES = 0.1


class ChatSession:
    """Holds a conversation with a model and its adapters.

    Attributes:
        generator: of the answers.
        lookup: how further adapters are found.
        on_terminal: a person types, who stops an answer by Ctrl-C.
        messages: all but the system message.
        system: the system message.
        selected: the adapters that answer; none for the base alone.
        compared: the adapters that answer the next question side by side.
    """

    def __init__(self, generator: TextGenerator, lookup: LookupOptions, system: str | None, on_terminal: bool) -> None:
        self.generator, self.lookup, self.on_terminal = generator, lookup, on_terminal
        self.messages: list[Message] = []
        self.compared: list[str] = []
        self.selected = list(generator.model.active_adapters)
        self.set_system(system)
        self._saved: set[Path] = set()

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters on the model."""
        return list(self.generator.model.peft_config)

    @property
    def label(self) -> str:
        """The name of what answers, for the prompt."""
        return one_line("+".join(self.selected) or "base")

    # -- answers -------------------------------------------------------------------------------------------

    def ask(self, text: str) -> None:
        """Answer a message, and keep both; of an answer that is interrupted, what was shown of it."""
        question = {"role": "user", "content": text}
        compared, self.compared = self.compared, []
        asked = [*self.messages, question]
        answer = self._side_by_side(asked, compared) if compared else self._streamed(asked)
        if answer is not None:
            self.messages += [question, {"role": "assistant", "content": answer}]

    def compare(self, names: Sequence[str]) -> None:
        """Have adapters answer the last question again, side by side; or the next one, where there is none yet.

        Of the answers to a next question, the first is kept in the conversation.
        """
        everyone = list(names) in ([], ["all"])
        chosen = [*self.adapters, BASE] if everyone else [self._found(name) for name in names]
        if len(set(chosen)) < 2:
            raise UsageError("There is nothing to compare.", hint="Name two adapters, or base and one: /compare A B")
        if not self.messages:
            self.compared = chosen
            print(f"The next question goes to {one_line(', '.join(chosen))}.", file=sys.stderr)
            return
        self._side_by_side(self.messages[:-1], chosen)

    def _streamed(self, messages: Sequence[Message]) -> str | None:
        """Print the answer to the last message as it comes, and return it; ``None`` where it is stopped before."""
        inputs = self._encoded(messages)
        streamer = self.generator.streamer()
        try:
            with self.generator.model.using(self.selected):
                [(answer, _)] = self.generator.answers(inputs, streamer)
        except KeyboardInterrupt:
            if not self._is_stopped():
                raise
            return streamer.shown or None
        return answer

    def _side_by_side(self, messages: Sequence[Message], names: Sequence[str]) -> str | None:
        """Print the answers of several adapters to the last message, and return the first's."""
        inputs = self._encoded(messages)
        for key, value in inputs.items():
            inputs[key] = value.repeat(len(names), 1)
        columns = Columns([name if name != BASE else "base" for name in names], self.generator)
        try:
            with columns.live:
                answers = [text for text, _ in self.generator.answers(inputs, columns, adapter_names=list(names))]
        except KeyboardInterrupt:
            if not self._is_stopped():
                raise
            return None
        columns.console.print(columns.table(answers))
        return answers[0]

    def _is_stopped(self) -> bool:
        """End the line of an interrupted answer, and tell whether it alone is stopped: where somebody types."""
        print(flush=True)
        return self.on_terminal

    def _encoded(self, messages: Sequence[Message]) -> Any:
        inputs = self.generator.encode([*system_message(self.system), *messages])
        length = inputs["input_ids"].shape[1]
        limit = getattr(self.generator.model.config, "max_position_embeddings", None)
        if limit is not None and length >= limit:
            raise UsageError(
                f"The conversation has grown to {length} tokens, and the model reads {limit}.",
                hint="/reset begins anew; /save keeps it before.",
            )
        return inputs

    # -- what the commands change --------------------------------------------------------------------------

    def choose(self, names: Sequence[str]) -> None:
        """Have these adapters answer from now on; none of them is the base alone."""
        adapters = [name for name in map(self._found, names) if name != BASE]
        if len(adapters) < len(names) > 1:
            raise UsageError("The base answers alone.", hint="/base switches to it.")
        with self.generator.model.using(adapters):
            self.selected = adapters

    def load(self, path: str, name: str | None = None) -> None:
        """Load an adapter, or all of a set, and have it answer; an adapter of that name is replaced.

        Raises:
            UsageError: a name is given for a set.
        """
        source = resolve(path, self.lookup, what="adapter")
        members = adapter_folders.members(source)
        if name and members:
            raise UsageError(f"{path} is a set, whose adapters have names.", hint="Leave out the name.")
        names = []
        for adapter in [member.source for member in members] or [source]:
            names.append(name or adapter_folders.free_name(adapter.origin, self.adapters))
            self.generator.model.load_adapter(adapter.root if adapter.file is None else adapter.file, names[-1])
        self.choose(names[:1])

    def reset(self) -> None:
        """Forget the messages, and keep the system message."""
        self.messages.clear()
        self.compared.clear()

    def set_system(self, text: str | None) -> None:
        """Set the system message; nothing removes it."""
        self.generator.check_system(text)
        self.system = text or None

    def save(self, path: Path) -> None:
        """Write the conversation as a line of JSON that `veneer train` reads.

        Raises:
            UsageError: there is nothing to save, or the file is there and not of this conversation.
        """
        if not self.messages:
            raise UsageError("There is nothing to save.", hint="Ask something first.")
        if exists(path) and path.resolve() not in self._saved:
            raise UsageError(f"{path} is there already.", hint="Choose another name.")
        line = json.dumps({"messages": [*system_message(self.system), *self.messages]}, ensure_ascii=False)
        with atomic_write(path) as temporary:
            temporary.write_text(f"{line}\n", encoding="utf-8", errors="backslashreplace")
        self._saved.add(path.resolve())

    def _found(self, name: str) -> str:
        """Return an adapter's name, or the one that stands for the base alone.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        if name == BASE or (name == "base" and name not in self.adapters):
            return BASE
        self.generator.model.adapters.get(name)
        return name


class Columns:
    """Shows answers side by side as their tokens come: a streamer of transformers for several rows."""

    def __init__(self, names: Sequence[str], generator: TextGenerator) -> None:
        self.names, self.generator = names, generator
        self.tokens: list[Any] | None = None
        self.shown_at = 0.0
        self.console = Console()
        self.live = Live(console=self.console, auto_refresh=False, transient=True)

    def put(self, value: Any) -> None:
        """Take the prompts, which come first, or a token of each row."""
        if self.tokens is None:
            self.tokens = []
            return
        self.tokens.append(value)
        if self.console.is_terminal and time.monotonic() - self.shown_at > _BETWEEN_PICTURES:
            import torch

            answers = [self.generator.text(row) for row in torch.stack(self.tokens, dim=1)]
            self.live.update(self.table(answers), refresh=True)
            self.shown_at = time.monotonic()

    def end(self) -> None:
        """Do nothing: what is shown goes away with ``live``."""

    def table(self, answers: Sequence[str]) -> Table:
        """Return a table with a column for each answer, which cannot steer the terminal."""
        table = Table(expand=True)
        for name in self.names:
            table.add_column(Text(one_line(name)), ratio=1, overflow="fold")
        table.add_row(*(Text(printable_prose(answer)) for answer in answers))
        return table
