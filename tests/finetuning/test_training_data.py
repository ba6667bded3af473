"""Files of training examples: what is read, what is refused with its line, and what is held back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import veneer
from veneer.finetuning.training_data import read_data

Written = Callable[..., Path]


def turn(role: str, content: Any = "w5") -> dict[str, Any]:
    return {"role": role, "content": content}


CHAT = {"messages": [turn("system"), turn("user", "w6"), turn("assistant", "w7")]}
PAIR = {"prompt": "w5", "completion": "w6"}
TURNS = {"prompt": [turn("user")], "completion": [turn("assistant", "w8")]}
TEXT = {"text": "w5 w6"}


@pytest.mark.parametrize("example", [CHAT, PAIR, TURNS, TEXT])
def test_each_kind(written: Written, example: dict[str, Any]) -> None:
    data = read_data(written([example, "", example]), None, None, 0)
    assert list(data.train) == [example] * 2
    assert data.needs_template == (example in (CHAT, TURNS))


def test_answers_apart(written: Written) -> None:
    more = {"messages": [*CHAT["messages"], turn("user", "w9"), turn("assistant", "w10")]}
    data = read_data(written([CHAT, more]), written([CHAT], "validation.jsonl"), None, 0).answers_apart()
    first = {"prompt": CHAT["messages"][:2], "completion": [turn("assistant", "w7")]}
    assert list(data.train) == [
        first,
        first,
        {"prompt": more["messages"][:4], "completion": [turn("assistant", "w10")]},
    ]
    assert list(data.validation) == [first]
    texts = read_data(written([TEXT]), None, None, 0)
    assert texts.answers_apart() is texts


def test_a_share_is_held_back(written: Written) -> None:
    path = written([{"text": f"w{i}"} for i in range(40)])
    data = read_data(path, None, 0.1, 3)
    assert (len(data.train), len(data.validation)) == (36, 4)
    assert sorted(str(e) for e in (*data.train, *data.validation)) == sorted(str({"text": f"w{i}"}) for i in range(40))
    assert read_data(path, None, 0.1, 3) == data
    assert read_data(path, None, 0.1, 4) != data
    assert len(read_data(path, None, 0.001, 3).validation) == 1
    with pytest.raises(veneer.UsageError, match="too few"):
        read_data(written([TEXT]), None, 0.5, 0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "no valid JSON at column"),
        ("[" * 100_000, "too many brackets"),
        ("[1]", "a list, not a JSON object"),
        ("{}", "keys none"),
        ({"question": "w5"}, "keys 'question'"),
        ({"prompt": "w5"}, "keys 'prompt'"),
        ({**PAIR, **TEXT}, "prompt and completion and text"),
        ({"messages": []}, "messages is no list of messages"),
        ({"messages": "w5"}, "messages is no list of messages"),
        ({"messages": [turn("user"), "w5"]}, "message 2 of messages is no object with role and content"),
        ({"messages": [turn("human"), turn("assistant")]}, "message 1 of messages has the role 'human'"),
        ({"messages": [turn("user", 5), turn("assistant")]}, "the content of message 1 is a int"),
        ({"messages": [turn("user"), turn("assistant", "")]}, "the content of message 2 is empty"),
        ({"messages": [turn("assistant"), turn("user"), turn("assistant")]}, "the first message is the assistant's"),
        ({"messages": [turn("user")]}, "the last message is not the assistant's"),
        ({"prompt": "w5", "completion": ""}, "completion is empty"),
        ({"prompt": "w5", "completion": [turn("assistant")]}, "both texts, or both lists"),
        ({"prompt": "w5", "completion": None}, "both texts, or both lists"),
        ({"prompt": [], "completion": [turn("assistant")]}, "prompt is no list of messages"),
        ({"text": ""}, "text is empty"),
        ({"text": ["w5"]}, "text is a list"),
        ("\x1b[31m", "no valid JSON"),
        ({"text": "w5 \ud83d"}, "half of a surrogate pair"),
    ],
)
def test_a_line_that_is_none(written: Written, line: Any, words: str) -> None:
    path = written([TEXT, "", line])
    with pytest.raises(veneer.CorruptFileError) as caught:
        read_data(path, None, None, 0)
    assert f"{path}:3: " in caught.value.message
    assert words in caught.value.message
    assert str(caught.value).isprintable()


def test_all_lines_are_told(written: Written) -> None:
    path = written([{"text": number} for number in range(7)])
    with pytest.raises(veneer.CorruptFileError, match=r":1: .*:5: .*; and 2 more\."):
        read_data(path, None, None, 0)
    with pytest.raises(veneer.CorruptFileError, match=r":1: the first line of text; .*:3: the first line of prompt"):
        read_data(written([TEXT, TEXT, PAIR]), None, None, 0)


def test_files_that_are_none(written: Written, tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "nothing.jsonl", "cannot be read"),
        (tmp_path, "cannot be read"),
        (written([]), "holds no examples"),
        (written(["", " "], "blank.jsonl"), "holds no examples"),
    ):
        with pytest.raises(veneer.SourceError, match=words):
            read_data(path, None, None, 0)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "w5"}\n{"text": "\xe4"}\n')
    with pytest.raises(veneer.CorruptFileError, match=r"latin.jsonl:\d: not UTF-8"):
        read_data(tmp_path / "latin.jsonl", None, None, 0)
    with pytest.raises(veneer.CorruptFileError, match=":2: the first line of prompt and completion in messages"):
        read_data(written([PAIR, TURNS], "mixed.jsonl"), None, None, 0)
    with pytest.raises(veneer.UsageError, match="holds text, and"):
        read_data(written([PAIR], "pairs.jsonl"), written([TEXT]), None, 0)


def test_keys_that_are_not_used(written: Written) -> None:
    with pytest.warns(veneer.printing.VeneerWarning, match="'id', 'source' of the lines are not used"):
        read_data(written([{**TEXT, "id": 3}, {**TEXT, "source": "x"}]), None, None, 0)
