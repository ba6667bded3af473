"""The report in a real browser: opened as a file, on a phone and on a desktop, in light and in dark."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.benching import examples
from tests.benching.browser import Browser
from veneer.benching import formats

PHONE, DESKTOP = 390, 1280
VIEWS = list(product((PHONE, DESKTOP), (False, True)))
MANY = tuple(f"an-adapter-with-a-long-name-{index}" for index in range(12))
# Setup of each kind of report: every plot and table comes up in one of them.
REPORTS: dict[str, Any] = {
    "several adapters": examples.setup(lengths=(128, 512)),
    "one adapter": examples.setup(("pirate",)),
    "many adapters": examples.setup(MANY),
    "no decode": examples.setup(("pirate", "json"), kind="forward"),
}
PLOTS = {"several adapters": 7, "one adapter": 6, "many adapters": 7, "no decode": 6}
# What sticks out of the page, or of its own card; a table or an SVG clips what does.
_OUTSIDE = """[...document.querySelectorAll('main *')].filter(e => {
  const box = e.getBoundingClientRect(), card = (e.parentElement.closest('.card') || document.body);
  const room = card.getBoundingClientRect();
  return box.width && (box.left < room.left - 0.5 || box.right > room.right + 0.5);
}).map(e => `${e.tagName} ${e.textContent.trim().slice(0, 60)}`)"""
_CLIPPED = """[...document.querySelectorAll('svg text')].filter(e => {
  const box = e.getBoundingClientRect(), room = e.closest('svg').getBoundingClientRect();
  return box.left < room.left - 0.5 || box.right > room.right + 0.5 || box.top < room.top - 0.5
    || box.bottom > room.bottom + 0.5 || !box.width;
}).map(e => e.textContent)"""
_OVERLAPPING = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);
  return texts.flatMap(([a, p], i) => texts.slice(i + 1).filter(([b, q]) =>
    p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3
  ).map(([b]) => `${a} / ${b}`));
})"""
_SEEN = """[...document.querySelectorAll('figure svg')].map(e => {
  const box = e.getBoundingClientRect();
  return [box.width, box.height, e.querySelectorAll('path').length, e.checkVisibility({checkOpacity: true})];
})"""
_FONTS = """[...document.querySelectorAll('svg text')].map(e =>
  parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a report -> its HTML file."""
    pytest.importorskip("matplotlib")
    root = tmp_path_factory.mktemp("reports")

    def saved(name: str) -> Path:
        folder = root / name.replace(" ", "-")
        return folder / "report.html" if folder.exists() else examples.report(REPORTS[name]).save(folder)

    return saved


@pytest.mark.parametrize(("width", "dark"), VIEWS)
@pytest.mark.parametrize("name", REPORTS)
def test_all_of_it_fits_and_is_seen(
    chromium: Browser, page: Callable[[str], Path], name: str, width: int, dark: bool
) -> None:
    chromium.open(page(name).as_uri(), width, dark)
    chromium.evaluate("document.querySelector('details').open = true")
    assert chromium.evaluate("innerWidth") == width
    assert chromium.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert chromium.evaluate(_OUTSIDE) == []
    assert chromium.evaluate(_CLIPPED) == []
    assert chromium.evaluate(_OVERLAPPING) == []
    drawn = chromium.evaluate(_SEEN)
    assert len(drawn) == PLOTS[name]
    for wide, high, paths, visible in drawn:
        assert wide > 250
        assert high > 50
        assert paths > 0
        assert visible
    assert min(chromium.evaluate(_FONTS)) >= 10


def test_it_asks_for_nothing_else(chromium: Browser, page: Callable[[str], Path]) -> None:
    file = page("several adapters")
    chromium.open(file.as_uri(), DESKTOP, dark=False)
    chromium.evaluate("document.querySelector('details').open = true")
    assert set(chromium.requests) == {file.as_uri()}
    assert chromium.evaluate("document.querySelectorAll('script, link, img, iframe, object').length") == 0
    addresses = re.findall(r"""(?:https?:)?//[^\s"'<>]+""", file.read_text(encoding="utf-8"))
    assert {address for address in addresses if "www.w3.org" not in address} == set()  # names of XML's vocabularies


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_summary_is_on_top(chromium: Browser, page: Callable[[str], Path], width: int) -> None:
    chromium.open(page("one adapter").as_uri(), width, dark=False)
    text = chromium.evaluate("document.body.innerText")
    assert text.index("Merge pirate.") < text.index("earned back after") < text.index("What was found")
    assert text.index("What was found") < text.index("Decoding") < text.index("Raw samples")
    assert text.index("· 2026-01-31") < text.index("Merge pirate.")
    bottom = "document.querySelector('.advice').getBoundingClientRect().bottom"
    assert chromium.evaluate(f"{bottom} < innerHeight")
    assert chromium.evaluate("document.title") == "Merge pirate."


def test_every_figure_is_told(chromium: Browser, page: Callable[[str], Path]) -> None:
    report = examples.report(REPORTS["several adapters"])
    chromium.open(page("several adapters").as_uri(), DESKTOP, dark=False)
    chromium.evaluate("document.querySelector('details').open = true")
    rows = chromium.evaluate("document.querySelectorAll('.samples tbody tr').length")
    assert rows == len(report.figures)
    text = formats.plain(chromium.evaluate("document.body.innerText"))
    for words in ("A Processor, 2 cores", "torch 2.13.0", "95 % interval", "mixed batch", "8 of 8", "weights on disk"):
        assert words in text


def test_each_plot_stands_beside_its_figures(chromium: Browser, page: Callable[[str], Path]) -> None:
    places = """[...document.querySelectorAll('.plots')].map(e => [
      e.getBoundingClientRect(), e.nextElementSibling.getBoundingClientRect()
    ].map(box => [box.left, box.right, box.top]))"""
    chromium.open(page("several adapters").as_uri(), DESKTOP, dark=False)
    for (_, right, top), (left, _, other) in chromium.evaluate(places):
        assert (right < left, top) == (True, other)
    keys = chromium.evaluate("[...document.querySelectorAll('.legend span')].map(e => e.textContent)")
    assert keys == ["base alone", "merged", "unmerged", "switching", "mixed batch", "95 % interval of the median"]
    chromium.open(page("several adapters").as_uri(), PHONE, dark=False)
    for (_, _, top), (_, _, other) in chromium.evaluate(places):
        assert top < other


def test_colours_mean_one_thing(chromium: Browser, page: Callable[[str], Path]) -> None:
    """That of merged models is on no plan, and none on the rule beside the recommendation, which holds all of it."""
    chromium.open(page("several adapters").as_uri(), DESKTOP, dark=False)
    assert "--merged" not in chromium.evaluate("document.querySelector('figure svg').outerHTML")
    rule = "getComputedStyle(document.querySelector('.advice')).borderLeftColor"
    assert chromium.evaluate(rule) == chromium.evaluate("getComputedStyle(document.body).color")
    assert chromium.evaluate("document.querySelectorAll('main > ul.cautions').length") == 0


def test_equal_bars_are_not_drawn() -> None:
    pytest.importorskip("matplotlib")
    from veneer.benching.report import plots

    report = examples.report()
    assert plots.loading(report, "peak") == ""
    assert "900" in plots.loading(report, "serving")


def test_a_phone_names_the_column_of_each_cell(chromium: Browser, page: Callable[[str], Path]) -> None:
    head = "getComputedStyle(document.querySelector('td[data-head]'), '::before').content"
    chromium.open(page("several adapters").as_uri(), DESKTOP, dark=False)
    assert (chromium.evaluate(head), chromium.evaluate("document.querySelector('thead').offsetHeight > 0")) == (
        "none",
        True,
    )
    chromium.open(page("several adapters").as_uri(), PHONE, dark=False)
    assert (chromium.evaluate(head), chromium.evaluate("document.querySelector('thead').offsetHeight")) == (
        '"a request"',
        0,
    )


@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read_in_light_and_dark(chromium: Browser, page: Callable[[str], Path], dark: bool) -> None:
    chromium.open(page("several adapters").as_uri(), DESKTOP, dark)
    card = chromium.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
    ground = luminance(card)
    assert (ground < 0.1) == dark
    texts = "[...document.querySelectorAll('main li, main td, main th, main h2, main strong, svg text')]"
    for kind, least, what in (("color", 4.5, texts), ("fill", 4.5, "[...document.querySelectorAll('svg text')]")):
        colours = chromium.evaluate(f"[...new Set({what}.map(e => getComputedStyle(e).{kind}))]")
        assert min(contrast(luminance(colour), ground) for colour in colours) >= least
    bars = chromium.evaluate(
        "[...new Set([...document.querySelectorAll('svg path')].map(e => getComputedStyle(e).fill))]"
        ".filter(c => c.startsWith('rgb('))"
    )
    assert len(bars) >= 5
    # Beside the frame, which may be faint, a bar has the contrast of a graphic (WCAG 2.2, 1.4.11).
    assert min(contrast(luminance(colour), ground) for colour in bars if colour != "rgb(0, 0, 0)") >= 2.5


def luminance(colour: str) -> float:
    """The relative luminance of ``rgb(r, g, b)`` (WCAG 2.2)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: float, b: float) -> float:
    """The contrast of two luminances (WCAG 2.2)."""
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)
