"""What every test runs under: no network, no progress bars."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

# Read when tqdm is imported, so it is set before anything is: progress bars would bury a failure's own output.
os.environ["TQDM_DISABLE"] = "1"

LOOPBACK = ("127.", "::1", "localhost")


class NetworkUsed(OSError):
    """A test, or what it called, went to the network."""


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[list[str]]:
    """Refuse every connection and look-up but loopback's, and note it: callers may swallow the refusal."""
    attempts: list[str] = []

    def allowed(host: Any) -> bool:
        name = host[0] if isinstance(host, tuple) else host
        return name is None or str(name).startswith(LOOPBACK)

    def refuse(host: Any) -> None:
        attempts.append(repr(host))
        raise NetworkUsed(f"tests have no network; something asked for {host!r}")

    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and not allowed(address):
            refuse(address)
        connect(self, address)

    def guarded_look_up(host: Any, *rest: Any, **options: Any) -> Any:
        if not allowed(host):
            refuse(host)
        return look_up(host, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        yield attempts


@pytest.fixture(autouse=True)
def network_unused(no_network: list[str]) -> Iterator[None]:
    """Fail the test that tried to reach the network, even where the refusal was caught."""
    no_network.clear()
    yield
    assert not no_network, f"this test reached for the network: {no_network}"


@pytest.fixture
def process_group() -> Iterator[None]:
    """Open torch's process group, of this process alone."""
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One browser for all tests of a module."""
    from tests.benching import browser

    path = browser.find()
    if path is None:
        pytest.skip(f"There is no Chromium on this machine (looked for {', '.join(browser.NAMES)}).")
    try:
        found = browser.Browser(path, tmp_path_factory.mktemp("chromium") / "profile")
    except (RuntimeError, OSError) as error:
        pytest.skip(f"{path} does not start here: {error}")
    with found:
        yield found
