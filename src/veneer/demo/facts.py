"""The data that the demo's adapters were trained on: short facts, each answered in three styles.

``facts.tsv`` holds one fact a line: split (``train`` or ``held-out``), topic, question, one-word answer, sentence.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Applied in order to a sentence that is padded with spaces.
_PIRATE = (
    (" is ", " be "),
    (" are ", " be "),
    (" of ", " o' "),
    (" and ", " an' "),
    (" your ", " yer "),
    (" you ", " ye "),
)


@dataclass(frozen=True)
class Fact:
    """A question with its answer."""

    split: str
    topic: str
    question: str
    word: str
    sentence: str


def facts(split: str) -> list[Fact]:
    """Read the facts of a split: ``"train"`` or ``"held-out"``."""
    with Path(__file__).with_name("facts.tsv").open(encoding="utf-8", newline="") as file:
        return [Fact(**row) for row in csv.DictReader(file, delimiter="\t") if row["split"] == split]


def as_json(fact: Fact) -> str:
    """Answer like ``{"topic": "geography", "answer": "Paris"}``."""
    return json.dumps({"topic": fact.topic, "answer": fact.word})


def as_pirate(fact: Fact) -> str:
    """Answer like ``Arr, matey! The capital o' France be Paris. Yo ho ho!``."""
    sentence = f" {fact.sentence} "
    for plain, pirate in _PIRATE:
        sentence = sentence.replace(plain, pirate)
    return f"Arr, matey!{sentence}Yo ho ho!"


def as_brief(fact: Fact) -> str:
    """Answer like ``Paris``."""
    return fact.word[0].upper() + fact.word[1:]


def is_json(answer: str) -> bool:
    """Tell whether an answer is a JSON object with a topic and an answer."""
    try:
        values = json.loads(answer)
    except json.JSONDecodeError:
        return False
    return isinstance(values, dict) and {"topic", "answer"} <= values.keys()


def is_pirate(answer: str) -> bool:
    """Tell whether an answer is a pirate's."""
    return answer.startswith("Arr, matey!")


def is_brief(answer: str) -> bool:
    """Tell whether an answer is a single word."""
    return answer.strip(".!").isalpha()


# Adapter's name -> the function that writes an answer in its style, and the one that recognises it.
STYLES: dict[str, tuple[Callable[[Fact], str], Callable[[str], bool]]] = {
    "json": (as_json, is_json),
    "pirate": (as_pirate, is_pirate),
    "brief": (as_brief, is_brief),
}
