"""Printable text, which cannot steer a terminal; sizes; warnings."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

import veneer
from veneer.configs.methods.lora import LoraConfig
from veneer.printing import nbytes, one_line, parse_bytes, printable, progress, quiet, warn


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


def test_a_warning_points_at_the_callers_line() -> None:
    with pytest.warns(UserWarning, match="for other tools") as caught:
        LoraConfig.from_dict({"peft_type": "LORA", "odd": None, "oddly": 1})
    assert {(w.category, w.filename) for w in caught} == {(veneer.VeneerWarning, __file__)}


def test_quiet_collects_veneers_warnings_alone() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet() as texts:
        warnings.warn("an adapter of somebody else's", UserWarning, stacklevel=1)
        warn("ours")
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.CRITICAL, False)
    assert texts == ["ours"]
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_quiet_imports_no_transformers_and_silences_one_that_comes() -> None:
    code = (
        "import sys; from veneer.printing import quiet\n"
        "with quiet():\n"
        "    print('transformers' in sys.modules)\n"
        "    from transformers.utils import logging\n"
        "    print(logging.get_verbosity() == logging.CRITICAL, logging.is_progress_bar_enabled())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "True", "False"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (270_900_000, "270.9 MB"),
        (5 * 10**9, "5.0 GB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_sizes_are_written(value: int, text: str) -> None:
    assert nbytes(value) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("5GB", 5 * 10**9), ("5.GB", 5 * 10**9), (" 512 MiB ", 512 * 2**20), (".5kb", 500), ("1TB", 10**12), ("7", 7)]
    + [(text, None) for text in ("", "GB", "0", "0.4", "-1", "1e3", "5 G B", "5PB", "nan", "\u0665GB", "9" * 400)],
)
def test_sizes_are_read(text: str, value: int | None) -> None:
    assert parse_bytes(text) == value


def test_progress_is_a_line_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Converting", shown=False):
        pass
    assert not capsys.readouterr().err
    with progress("Converting", shown=True):
        pass
    assert capsys.readouterr().err == "Converting\n"
