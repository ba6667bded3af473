"""Text from a checkpoint cannot steer the terminal that shows it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.printing import one_line, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, naïve 字 🙂", "plain, naïve 字 🙂"),
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("a\rb\x07\x08", r"a\rb\x07\x08"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202etxt.exe", r"\u202etxt.exe"),
        ("\ud800", r"\ud800"),
        ("two\nlines", "two\nlines"),
    ],
)
def test_what_a_terminal_would_obey_is_spelt_out(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters(exclude_categories=[])))
def test_any_text_is_one_printable_line(text: str) -> None:
    shown = one_line(text)
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    shown.encode()
    assert one_line(shown) == shown
