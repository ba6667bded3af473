"""The process of the server: it ends when its engine is dead for good."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.models import build
from tests.serving.fake_engine import FakeEngine
from tests.serving.http_service import one_adapter_service
from veneer.errors import UnsupportedError
from veneer.serving import server
from veneer.serving.engine import TransformersEngine
from veneer.serving.engine_types import EngineStatus
from veneer.serving.stopping import Stopping


class LeftError(Exception):
    """The process would have ended."""


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The codes with which the process would have ended."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise LeftError

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(server, "_LOOK", 0.01)
    return codes


def test_an_engine_that_stays_dead_ends_the_process(tmp_path: Path, codes: list[int]) -> None:
    service = one_adapter_service(tmp_path)
    assert isinstance(service.engine, FakeEngine)
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(asyncio.wait_for(server._watch(service, 0.1, Stopping().leave), 0.2))
    service.engine.dead = True
    with pytest.raises(LeftError):
        asyncio.run(asyncio.wait_for(server._watch(service, 0.1, Stopping().leave), 10))
    assert codes == [70]


def test_a_process_that_was_paused_goes_on(tmp_path: Path, codes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    service = one_adapter_service(tmp_path)
    assert isinstance(service.engine, FakeEngine)
    alive, looks = service.engine.status, iter([True])

    def status() -> EngineStatus:
        return replace(alive(), hangs=next(looks, False), alive=False)

    monkeypatch.setattr(service.engine, "status", status)
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(asyncio.wait_for(server._watch(service, 600, Stopping().leave), 0.2))
    assert codes == []


def test_an_engine_that_hangs_ends_the_process_at_once(tmp_path: Path, codes: list[int]) -> None:
    service = one_adapter_service(tmp_path)
    assert isinstance(service.engine, FakeEngine)
    service.engine.hangs = True
    with pytest.raises(LeftError):
        asyncio.run(asyncio.wait_for(server._watch(service, 600, Stopping().leave), 10))
    assert codes == [70]


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        TransformersEngine(build("t5")).start()


def test_a_process_that_ends_at_once_leaves_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    stopping = Stopping()
    with stopping.temporary_folder("veneer-test-") as folder:
        (folder / "kept").mkdir(mode=0o555)
        stopping.leave(70)
        assert (codes, folder.exists()) == ([70], False)


def test_a_process_ends_though_its_temporary_folder_cannot_be_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, **_: object) -> None:
        raise OSError(errno.ENOTEMPTY, "a thread writes there")

    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    stopping = Stopping()
    with stopping.temporary_folder("veneer-test-") as folder:
        (folder / "kept").mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(os, "rmdir", refuse)
            stopping.leave(70)
        assert (codes, folder.exists()) == ([70], True)
    assert not folder.exists()


def test_a_signal_cancels_what_runs_even_before_it_begins() -> None:
    ran: list[str] = []

    async def work(number: int | None) -> None:
        ran.append("begun")
        if number is not None:
            signal.raise_signal(number)
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ran.append("cleaned up")

    for number in (signal.SIGINT, signal.SIGTERM):
        stopping = Stopping()
        with stopping.on_signals(), pytest.raises(SystemExit) as caught:
            stopping.run(work(number))
        assert (caught.value.code, ran) == (0, ["begun", "cleaned up"])
        ran.clear()
    stopping = Stopping()
    stopping._told = True  # by a signal while the loop is made
    with pytest.raises(SystemExit):
        stopping.run(work(None))
    assert not ran
    with pytest.raises(SystemExit), Stopping().on_signals():
        signal.raise_signal(signal.SIGTERM)
