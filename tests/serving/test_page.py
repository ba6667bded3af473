"""The page in a real browser, on a phone and on a desktop, in light and in dark."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.benching.browser import Browser
from tests.serving.fake_engine import FakeEngine, served
from tests.serving.http_service import DIGEST, one_adapter_service
from veneer.serving.service import Service

VIEWS = [(width, dark) for width in (390, 1280) for dark in (False, True)]
# Of text and what is behind it, as WCAG has it.
_CONTRAST = """(() => {
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (e) => { for (; e; e = e.parentElement) {
    const c = parts(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } };
  return Math.min(...[...document.querySelectorAll('label, input, button:not(:disabled), dd, dt, th, td, h1, h2, p')]
    .filter((e) => e.checkVisibility())
    .map((e) => [parts(getComputedStyle(e).color).slice(0, 3), behind(e)].map(light).sort((a, b) => b - a))
    .map(([a, b]) => (a + 0.05) / (b + 0.05)));
})()"""


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return one_adapter_service(tmp_path, page=True, runtime_adapters=True)


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with served(service) as url:
        yield f"{url}/"


def reached(chromium: Browser, expression: str) -> Any:
    end = time.monotonic() + 10
    while not (value := chromium.evaluate(expression)):
        assert time.monotonic() < end, expression
        time.sleep(0.02)
    return value


def ask(chromium: Browser, prompt: str, tokens: int) -> None:
    chromium.evaluate(
        f"document.getElementById('prompt').value = {prompt!r}; document.getElementById('max-tokens').value = {tokens};"
        "document.getElementById('ask').requestSubmit()"
    )


def opened(chromium: Browser, url: str, width: int = 1280, dark: bool = False) -> None:
    chromium.open(url, width, dark)
    reached(chromium, "document.body.dataset.ready === 'true'")


def text_of(chromium: Browser, selector: str) -> list[str]:
    found: list[str] = chromium.evaluate(f"[...document.querySelectorAll('{selector}')].map((e) => e.textContent)")
    return found


@pytest.mark.parametrize(("width", "dark"), VIEWS)
def test_two_columns_are_answered_and_all_fits(chromium: Browser, url: str, width: int, dark: bool) -> None:
    opened(chromium, url, width, dark)
    ask(chromium, "w1 w2", 3)
    reached(chromium, "[...document.querySelectorAll('.tokens')].every((e) => e.textContent.startsWith('3'))")
    first, second = text_of(chromium, ".answer")
    assert first != second
    assert len(first.split()) == len(second.split()) == 3
    assert text_of(chromium, ".digest") == [DIGEST, "the base"]
    assert chromium.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert chromium.evaluate(_CONTRAST) >= 4.5


def test_it_asks_this_server_alone(chromium: Browser, url: str) -> None:
    opened(chromium, url)
    ask(chromium, "w1", 2)
    reached(chromium, "document.querySelector('.tokens').textContent.startsWith('2')")
    assert all(request.startswith(url) for request in chromium.requests)
    assert f"{url}v1/compare" in chromium.requests


def test_an_answer_is_text_and_never_markup(
    chromium: Browser, url: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = FakeEngine._event

    def markup(self: FakeEngine, request: Any, index: int) -> Any:
        return replace(event(self, request, index), text="<img src=x onerror=alert(1)>")

    monkeypatch.setattr(FakeEngine, "_event", markup)
    opened(chromium, url)
    ask(chromium, "w1", 1)
    reached(chromium, "document.querySelector('.tokens').textContent.startsWith('1')")
    assert text_of(chromium, ".answer")[0] == "<img src=x onerror=alert(1)>"
    assert chromium.evaluate("document.querySelectorAll('.answer img').length") == 0


def test_names_and_errors_are_text_and_never_markup(
    chromium: Browser, url: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "<img src=x onerror=alert(1)>'\"&"
    service.settings = replace(service.settings, base_name=evil)
    infos = service.registry.adapters
    monkeypatch.setattr(
        service.registry, "adapters", lambda caller: [replace(info, name=evil, error=evil) for info in infos(caller)]
    )
    opened(chromium, url)
    reached(chromium, "document.querySelectorAll('#rows tr').length === 1")
    assert text_of(chromium, "#base") == [f"on {evil}"]
    assert text_of(chromium, "#rows th") == text_of(chromium, "#rows .why") == [evil]
    assert chromium.evaluate("[...document.querySelectorAll('#models option')].map((e) => e.value)") == [evil, evil]
    assert chromium.evaluate("document.querySelectorAll('img').length") == 0


def test_an_unknown_adapter_is_told_and_differences_are_marked(chromium: Browser, url: str) -> None:
    opened(chromium, url)
    chromium.evaluate("document.querySelector('.model').value = 'none'")
    ask(chromium, "w1", 2)
    assert "'none'" in reached(chromium, "document.querySelector('#status.wrong')?.textContent")
    chromium.evaluate("document.querySelector('.model').value = 'a'")
    ask(chromium, "w1", 2)
    reached(chromium, "document.querySelector('.tokens').textContent.startsWith('2')")
    chromium.evaluate("document.getElementById('differences').click()")
    assert len(text_of(chromium, ".answer mark")) == 2


def test_a_running_comparison_is_stopped(chromium: Browser, url: str, service: Service) -> None:
    assert isinstance(service.engine, FakeEngine)
    service.engine.delay = 0.1
    opened(chromium, url)
    ask(chromium, "w1", 60)
    reached(chromium, "document.querySelector('.answer').textContent")
    chromium.evaluate("document.getElementById('run').click()")
    reached(chromium, "document.getElementById('status').textContent === 'Stopped.'")
    end = time.monotonic() + 5
    while service.engine.running and time.monotonic() < end:
        time.sleep(0.02)
    assert not service.engine.running


def test_the_states_of_adapters_are_for_admin_keys(chromium: Browser, url: str) -> None:
    opened(chromium, url)
    assert text_of(chromium, "#rows th") == ["a"]
    assert text_of(chromium, "#rows button") == ["Pin", "Remove"]
    assert chromium.evaluate("document.getElementById('register').hidden") is False
