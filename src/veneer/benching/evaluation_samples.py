"""Reads the texts on which perplexity is measured. Imports no torch.

A text file is one text. A file of JSON Lines has a record on each line, in the forms that TRL takes:

    {"text": "..."}                                 all of it is predicted
    {"prompt": "...", "completion": "..."}          the completion is predicted; both may be lists of messages
    {"messages": [{"role": ..., "content": ...}]}   every message of the assistant is predicted
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import SourceError
from veneer.files.json_file import unreadable

JSON_LINES = ".jsonl"
_FORMS = 'Each line is {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}.'

Message = dict[str, Any]


@dataclass(frozen=True)
class EvaluationSample:
    """A text that is predicted, with what stands before it.

    Attributes:
        where: the file, and the line of a record.
        before: what is given: a text, or messages.
        predicted: what is predicted: a text, or the message that follows.
    """

    where: str
    before: str | list[Message]
    predicted: str | Message


def read_samples(file: Path) -> list[EvaluationSample]:
    """Read the samples of a file.

    Raises:
        SourceError: it is missing, damaged or holds nothing to predict.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{file}: not UTF-8 text.", hint="Give a text file, or JSON Lines (.jsonl).") from error
    except OSError as error:
        raise unreadable(file, error) from error
    samples = list(_records(file, text)) if file.suffix == JSON_LINES else [EvaluationSample(str(file), "", text)]
    samples = [sample for sample in samples if _has_text(sample)]
    if not samples:
        hint = _FORMS if file.suffix == JSON_LINES else "Give a file with a text of some sentences."
        raise SourceError(f"{file} holds nothing to predict.", hint=hint)
    return samples


def _has_text(sample: EvaluationSample) -> bool:
    text = sample.predicted if isinstance(sample.predicted, str) else sample.predicted["content"]
    # Without anything before it, a single character has nothing that it follows from.
    return len(text.strip()) > (0 if sample.before else 1)


def _records(file: Path, text: str) -> Iterator[EvaluationSample]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                yield from _samples_of(where, json.loads(line))
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{where}: no valid JSON: {error}.", hint=_FORMS) from error


def _samples_of(where: str, record: Any) -> Iterator[EvaluationSample]:
    match record:
        case {"messages": [*messages]} if _are_messages(messages):
            yield from _answers(where, [], messages)
        case {"prompt": [*prompt], "completion": [*completion]} if _are_messages([*prompt, *completion]):
            yield from _answers(where, prompt, completion)
        case {"prompt": str(prompt), "completion": str(completion)}:
            yield EvaluationSample(where, prompt, completion)
        case {"text": str(text)}:
            yield EvaluationSample(where, "", text)
        case _:
            raise SourceError(f"{where}: no record of a known form.", hint=_FORMS)


def _are_messages(messages: list[Any]) -> bool:
    return all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )


def _answers(where: str, before: list[Message], messages: list[Message]) -> Iterator[EvaluationSample]:
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            yield EvaluationSample(where, [*before, *messages[:place]], message)
