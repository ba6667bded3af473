"""Models and adapters that peft made, one of each for all tests that look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.models import CASES
from tests.oracle.options import ABSENT, OPTIONS
from tests.oracle.peer import Peer, make_peer, save_base

PAIRS = [(arch, option) for arch in CASES for option in OPTIONS if (arch, option) not in ABSENT]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Models this small run faster without a pool of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture's name -> the folder its base is saved in."""

    @cache
    def folder(arch: str) -> Path:
        return save_base(arch, tmp_path_factory.mktemp("bases") / arch)

    return folder


@pytest.fixture(scope="session", params=PAIRS, ids=lambda pair: f"{pair[0]}, {pair[1]}")
def peer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base_folder: Callable[[str], Path]
) -> Peer:
    """An adapter that peft made, for each architecture and option."""
    arch, option = request.param
    return make_peer(arch, option, base_folder(arch), tmp_path_factory.mktemp("peer"))
