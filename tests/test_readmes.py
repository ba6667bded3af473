"""The Chinese README is the English one: the same code, the same headings, links and pictures in their order."""

from __future__ import annotations

import re

import pytest

from tests.test_docs import BLOCK, HEADING, LINK, ROOT

OTHERS = ["README.zh-CN.md"]
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")


def code(text: str) -> list[tuple[str, str]]:
    """The blocks of code with their kinds, without comments, which are translated."""
    return [(block["kind"], re.sub(r" *#.*", "", block["text"])) for block in BLOCK.finditer(text)]


def levels(text: str) -> list[int]:
    """How deep each heading is."""
    return [len(heading[0].partition(" ")[0]) for heading in HEADING.finditer(BLOCK.sub("", text))]


@pytest.mark.parametrize("name", OTHERS)
def test_it_is_the_english_one(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert code(text) == code(ENGLISH)
    assert levels(text) == levels(ENGLISH)
    here, there = ([link for link in LINK.findall(page) if not link.startswith("README")] for page in (text, ENGLISH))
    assert here == there
    assert "](README.md)" in text
    assert f"]({name})" in ENGLISH


@pytest.mark.parametrize("name", OTHERS)
def test_numbers_and_names_are_the_english_ones(name: str) -> None:
    """What stands in code, and every figure in the text, is in both."""
    text = (ROOT / name).read_text(encoding="utf-8")
    here, there = (BLOCK.sub("", page).partition("<!-- speed")[0] for page in (text, ENGLISH))
    for what in (r"`[^`\n]+`", r"\d[\d.]* (?:GB|MB)"):
        assert sorted(re.findall(what, here)) == sorted(re.findall(what, there))
