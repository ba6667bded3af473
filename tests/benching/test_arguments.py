"""Options as they are typed, and the texts of figures."""

from __future__ import annotations

import math

import pytest

from veneer.benching import formats
from veneer.benching.arguments import counts, shares, size, spread_over
from veneer.errors import ConfigError


def test_counts() -> None:
    assert counts("8, 1,8", "--batch") == (1, 8)
    for text in ("", "0", "1,", "1;8", "-1", "x", "1.5", "²"):
        with pytest.raises(ConfigError, match=r"--batch .* no list of whole numbers"):
            counts(text, "--batch")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("16GB", 16 * 10**9), ("16 gib", 16 * 2**30), ("1.5MB", 1_500_000), ("1000", 1000), ("2TB", 2 * 10**12)],
)
def test_sizes(text: str, wanted: int) -> None:
    assert size(text, "--memory") == wanted


@pytest.mark.parametrize("text", ["", "GB", "16XB", "-1GB", "0", "1e3", "16GB16GB", "nan"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--memory .* no amount of memory"):
        size(text, "--memory")


def test_shares() -> None:
    assert shares("a=80, b=15,c=5", "--traffic") == {"a": 80, "b": 15, "c": 5}
    for text in ("", "a", "a=", "=1", "a=x", "a=1,a=2", "a=1,,b=2", "a=1 b=2"):
        with pytest.raises(ConfigError, match=r"--traffic .* does not say"):
            shares(text, "--traffic")


def test_traffic_is_spread_over_the_adapters() -> None:
    assert spread_over(None, ["a", "b"]) == {"a": 0.5, "b": 0.5}
    found = spread_over({"a": 1, "b": 3}, ["a", "b"])
    assert list(found.items()) == [("b", 0.75), ("a", 0.25)]
    assert spread_over({"a": 1, "b": 0}, ["a", "b"]) == {"a": 1, "b": 0}
    for traffic, words in (
        ({"a": 1, "bb": 1}, "Did you mean 'b'"),
        ({"a": 1}, "says nothing of b"),
        ({"a": 0, "b": 0}, "not all 0"),
        ({"a": 2, "b": -1}, "numbers from 0 on"),
        ({"a": math.nan, "b": 1}, "numbers from 0 on"),
        ({"a": math.inf, "b": 1}, "numbers from 0 on"),
    ):
        with pytest.raises(ConfigError, match=words):
            spread_over(traffic, ["a", "b"])


def test_figures_have_three_digits_and_a_unit() -> None:
    shown = {
        formats.seconds(0.0412): "41.2 ms",
        formats.seconds(8.13e-6): "8.13 µs",
        formats.seconds(1.2345): "1.23 s",
        formats.seconds(0.9999): "1.00 s",
        formats.seconds(125): "2 min 05 s",
        formats.seconds(0): "0 µs",
        formats.nbytes(271e6): "271 MB",
        formats.nbytes(1.5e9): "1.50 GB",
        formats.percent(0.042): "4.2 %",
        formats.number(1234567): "1 234 567",
        formats.number(math.inf): "∞",
        formats.count(1, "request"): "1 request",
        formats.count(1200, "request"): "1 200 requests",
        formats.listed(("a", "b", "c")): "a, b and c",
        formats.listed("abcde"): "a, b, c, d and e",
        formats.listed("abcdefg"): "a, b, c, d and 3 others",
        formats.listed("abcdefg", 7): "a, b, c, d, e, f and g",
    }
    assert [formats.plain(text) for text in shown] == list(shown.values())
