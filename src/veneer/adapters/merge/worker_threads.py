"""Shares the cores among pieces of work, each of which computes in one thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from veneer.adapters.merge.cores import cores
from veneer.patches.scratch_memory import keep_block

T = TypeVar("T")


@contextlib.contextmanager
def one_thread_each(
    workers: int | None = None, prepare: Callable[[], None] | None = None
) -> Iterator[ThreadPoolExecutor]:
    """Give a pool of threads, one for each core, in each of which torch computes in that thread alone.

    Args:
        workers: how many threads, if not one for each core.
        prepare: called first in each thread.
    """

    def start() -> None:
        torch.set_num_threads(1)
        if prepare is not None:
            prepare()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers or cores(), initializer=start) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def for_each(action: Callable[[T], object], items: Iterable[T]) -> None:
    """Do ``action`` with each item, on as many cores as torch uses; an error is raised when the others are done."""
    with one_thread_each(torch.get_num_threads(), keep_block) as pool:
        for _ in pool.map(action, items):
            pass
