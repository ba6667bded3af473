"""Reads files of training examples, JSONL, and names every line that is none; imports no torch.

An example is one of ``{"messages": [...]}``, ``{"prompt": ..., "completion": ...}`` and ``{"text": ...}``; all of a run
are of one kind.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veneer.errors import CorruptFileError, UsageError
from veneer.files.json_file import unreadable
from veneer.printing import warn

Example = Mapping[str, Any]

# Kind of example -> its keys.
KINDS = {"messages": ("messages",), "prompt and completion": ("prompt", "completion"), "text": ("text",)}
_ROLES = ("system", "user", "assistant")
_SHOWN = 5
_HINT = (
    'A line is {"messages": [{"role": ..., "content": ...}, ...]}, {"prompt": ..., "completion": ...} or {"text": ...}.'
)


@dataclass(frozen=True)
class TrainingData:
    """The examples of a run.

    Attributes:
        kind: of all of them, in words.
        train: those to train on.
        validation: those to evaluate on; may be none.
    """

    kind: str
    train: Sequence[Example]
    validation: Sequence[Example] = ()

    @property
    def needs_template(self) -> bool:
        """True where an example holds messages, which a chat template turns into text."""
        return any(isinstance(value, list) for value in self.train[0].values())

    def answers_apart(self) -> TrainingData:
        """Return conversations with an example for each answer, so that the loss can count answers alone."""
        if self.kind != "messages":
            return self
        train, validation = (list(_answers(examples)) for examples in (self.train, self.validation))
        return TrainingData("prompt and completion", train, validation)


def read_data(data: Path, validation: Path | None, share: float | None, seed: int) -> TrainingData:
    """Read the examples to train on, and those to evaluate on.

    Args:
        data: the file.
        validation: the file of those to evaluate on.
        share: in its place, the share of ``data`` that is held back, drawn with ``seed``.
        seed: see ``share``.

    Raises:
        CorruptFileError: a line is no example; names the lines. UsageError: too few examples, or of two kinds.
    """
    kind, train = _read(data)
    read = TrainingData(kind, train)
    if validation is not None:
        other, examples = _read(validation)
        if other != kind:
            raise UsageError(
                f"{validation} holds {other}, and {data} {kind}.", hint="Give both the same kind of examples."
            )
        return replace(read, validation=examples)
    return read if share is None else _split(read, share, seed, data)


def _split(data: TrainingData, share: float, seed: int, path: Path) -> TrainingData:
    count = max(1, round(len(data.train) * share))
    if count >= len(data.train):
        raise UsageError(
            f"{path}: {len(data.train)} examples are too few to hold {share:.0%} back.", hint="Give --validation FILE."
        )
    held_back = set(random.Random(seed).sample(range(len(data.train)), count))
    parts = ([e for i, e in enumerate(data.train) if (i in held_back) is held] for held in (False, True))
    return TrainingData(data.kind, *parts)


def _read(path: Path) -> tuple[str, list[Example]]:
    """Read a file, and return the kind of its examples and them."""
    examples: list[Example] = []
    problems: list[str] = []
    kinds: dict[str, int] = {}
    unused: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            kind, example, others = _example(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
            continue
        kinds.setdefault(kind, number)
        examples.append(example)
        unused.update(dict.fromkeys(others, number))
    if len(kinds) > 1:
        problems += [f"{path}:{number}: the first line of {kind}" for kind, number in kinds.items()]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        hint = "Give each kind a file of its own." if len(kinds) > 1 else _HINT
        raise CorruptFileError(f"{'; '.join(problems[:_SHOWN])}{more}.", hint=hint)
    if not examples:
        raise CorruptFileError(f"{path} holds no examples.", hint=_HINT)
    if unused:
        warn(f"{path}: {', '.join(map(repr, sorted(unused)))} of the lines are not used.")
    return next(iter(kinds)), examples


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each line that is not blank."""
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path}:{number + 1}: not UTF-8 text.", hint="Save the file as UTF-8.") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _example(line: str) -> tuple[str, Example, set[str]]:
    """Return the kind of a line's example, the example, and the keys that are not used.

    Raises:
        ValueError: it is none; says why.
    """
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no valid JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("too many brackets in one another") from error
    if not isinstance(values, dict):
        raise ValueError(f"a {type(values).__name__}, not a JSON object")
    fitting = [kind for kind, keys in KINDS.items() if set(keys) <= values.keys()]
    if len(fitting) != 1:
        found = " and ".join(fitting) or f"keys {', '.join(map(repr, values)) or 'none'}"
        raise ValueError(f"{found}, where one of messages, prompt and completion, or text is wanted")
    [kind] = fitting
    example = {key: values[key] for key in KINDS[kind]}
    _CHECKS[kind](example)
    if isinstance(example.get("prompt"), list):
        kind = f"{kind} in messages"
    return kind, example, values.keys() - example.keys()


def _check_messages(example: Example) -> None:
    _check_turns("messages", example["messages"])
    if example["messages"][0]["role"] == "assistant":
        raise ValueError("the first message is the assistant's, which answers nothing")
    if example["messages"][-1]["role"] != "assistant":
        raise ValueError("the last message is not the assistant's, and there is nothing to learn from it")


def _check_pair(example: Example) -> None:
    if len({type(value) for value in example.values()}) > 1:
        raise ValueError("prompt and completion are to be both texts, or both lists of messages")
    if isinstance(example["prompt"], list):
        for name, value in example.items():
            _check_turns(name, value)
        return
    _check_text("prompt", example["prompt"], may_be_empty=True)
    _check_text("completion", example["completion"])


def _check_turns(name: str, turns: Any) -> None:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{name} is no list of messages")
    for index, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise ValueError(f"message {index} of {name} is no object with role and content")
        if turn["role"] not in _ROLES:
            raise ValueError(f"message {index} of {name} has the role {turn['role']!r}, none of {', '.join(_ROLES)}")
        _check_text(f"the content of message {index}", turn["content"], may_be_empty=turn["role"] != "assistant")


def _check_text(name: str, value: Any, may_be_empty: bool = False) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}, not a text")
    if not value and not may_be_empty:
        raise ValueError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half of a surrogate pair, which is no character") from error


_CHECKS: Mapping[str, Callable[[Example], None]] = {
    "messages": _check_messages,
    "prompt and completion": _check_pair,
    "text": lambda example: _check_text("text", example["text"]),
}


def _answers(examples: Sequence[Example]) -> Iterator[Example]:
    for example in examples:
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in example["messages"]]
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                yield {"prompt": messages[:index], "completion": [message]}
