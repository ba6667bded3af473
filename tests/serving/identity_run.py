"""Asks a server under many adapters while they come, move and go, and holds each answer to the version that it names.

    python -m tests.serving.identity_run --adapters 1000 --slots 32 --clients 64 --requests 2000

Clients ask for adapters, half of the time by Zipf's law, half evenly, and leave some answers early; meanwhile adapters
are registered, replaced, rolled back and removed, most often those most asked for. Then one name is replaced again and
again under load. An answer is right where it is `generate`'s under the version in its header, which the name may have
had at that time; an error is right where what was done at that time explains it. The command exits with 1 where
anything is not right.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.models import VOCAB
from tests.serving.engine_world import tokenizer
from tests.serving.http_service import call
from tests.serving.identity_changes import Changes
from tests.serving.identity_client import PATIENCE, Answered, Asked, answered
from tests.serving.identity_verdict import Judge, Outcome
from tests.serving.many_adapters import Oracle, write_adapter
from tests.serving.name_history import NameHistory
from tests.serving.served_process import save_base, started

BASE = "base"
_PROMPTS = 12
_MOST_TOKENS = 48
# The seed of a DoRA of three modules. Versions of one form are those whose tensors could be mixed up.
_DORA = 24
# Of the server, if nothing else is said.
_LOAD_WAIT = 10.0
# Zero where no request runs, and the engine never failed.
_IDLE = (
    "veneer_requests_running",
    "veneer_requests_waiting",
    "veneer_kv_use_ratio",
    'veneer_bank_slots{state="leased"}',
    "veneer_engine_restarts_total",
)


@dataclass(frozen=True)
class Sizes:
    """How much is asked.

    Attributes:
        adapters: those that the server starts with.
        slots: of the server.
        clients: how many ask at a time.
        requests: the fewest that they send; they go on until all changes are made.
        changes: of the adapters.
        seed: of all that is random.
    """

    adapters: int
    slots: int
    clients: int
    requests: int
    changes: int
    seed: int = 0


class Traffic:
    """Asks a server for adapters at random, and has them changed meanwhile.

    Args:
        url: of the server.
        histories: name -> what is done to it.
        changes: makes the changes.
    """

    def __init__(self, url: str, histories: Mapping[str, NameHistory], changes: Changes) -> None:
        self._url, self._histories, self._changes = url, histories, changes
        self._names = list(histories)
        self._zipf = list(itertools.accumulate(1 / (place + 1) for place in range(len(self._names))))
        self._answers: list[Answered] = []

    def run(self, sizes: Sizes, changers: int) -> list[Answered]:
        """Send the requests and make the changes, each when its share of the requests is sent."""
        prompts, numbers, left = _prompts(sizes.seed), itertools.count(), itertools.count(sizes.changes - 1, -1)
        due, over = threading.Semaphore(0), threading.Event()

        def client() -> None:
            while (number := next(numbers)) < sizes.requests or not over.is_set():
                for _ in range(_due(number + 1, sizes) - _due(number, sizes)):
                    due.release()
                self._ask(random.Random(f"request {number} {sizes.seed}"), prompts)

        def changer() -> None:
            while (number := next(left)) >= 0:
                due.acquire()
                self._change(random.Random(f"change {number} {sizes.seed}"))

        with ThreadPoolExecutor(sizes.clients + changers) as threads:
            clients = [threads.submit(client) for _ in range(sizes.clients)]
            changes = [threads.submit(changer) for _ in range(changers)]
            try:
                for task in changes:
                    task.result()
            finally:
                over.set()
            for task in clients:
                task.result()
        return self._answers

    def _name(self, chance: random.Random, evenly: float) -> str:
        return chance.choices(self._names, cum_weights=None if chance.random() < evenly else self._zipf)[0]

    def _ask(self, chance: random.Random, prompts: Sequence[tuple[int, ...]]) -> None:
        name = BASE if chance.random() < 0.04 else self._name(chance, evenly=0.5)
        history = self._histories.get(name) or NameHistory()
        versions = history.versions  # which others replace meanwhile
        asked = Asked(
            name,
            chance.choice(versions) if versions and chance.random() < 0.1 else None,
            chance.choice(prompts),
            tokens=chance.randint(1, _MOST_TOKENS),
            streams=chance.random() < 0.5,
            leaves=chance.randint(0, 30) if chance.random() < 0.12 else None,
        )
        with history.used():
            self._answers.append(answered(self._url, asked))

    def _change(self, chance: random.Random) -> None:
        while not (history := self._histories[name := self._name(chance, evenly=0.2)]).changing.acquire(timeout=0.01):
            pass
        try:
            self._changes.make(name, history, chance)
        finally:
            history.changing.release()


def _due(requests: int, sizes: Sizes) -> int:
    """Return how many changes are due when so many requests are sent."""
    return min(requests * sizes.changes // sizes.requests, sizes.changes)


def _prompts(seed: int) -> list[tuple[int, ...]]:
    chance = random.Random(seed)
    return [tuple(chance.randrange(3, VOCAB) for _ in range(3 + 5 * number)) for number in range(_PROMPTS)]


def many_adapters(folder: Path, sizes: Sizes) -> Outcome:
    """Run a server with many adapters, ask it while they change, and judge its answers."""
    outcome, folders, histories = Outcome(), {}, {}
    for number in range(sizes.adapters):
        adapter = folder / "adapters" / f"a{number}"
        digest = write_adapter(adapter, number)
        folders[digest], histories[adapter.name] = adapter, NameHistory([digest], digest)
    histories |= {f"late{number}": NameHistory() for number in range(1 + sizes.adapters // 20)}
    histories = dict(random.Random(sizes.seed).sample(list(histories.items()), len(histories)))
    with server(folder, sizes, f"--adapters={folder / 'adapters'}") as url:
        changes = Changes(url, folder / "sources", folders, range(sizes.adapters), outcome)
        answers = Traffic(url, histories, changes).run(sizes, changers=sizes.clients // 4)
        if left := remains(url):
            outcome.blame("left behind", str(left))
    Judge(Oracle(folders), histories, _LOAD_WAIT).judge(answers, outcome)
    return outcome


def one_name(folder: Path, sizes: Sizes) -> Outcome:
    """Replace one name again and again while clients ask for it; when it is gone, nothing of it takes memory."""
    outcome, first = Outcome(), folder / "sources" / "first"
    folders = {write_adapter(first, 0, _DORA): first}
    history = NameHistory(list(folders), next(iter(folders)))
    with server(folder, sizes) as url:
        before = bytes_of_one(url, first)
        changes = Changes(url, folder / "sources", folders, range(1), outcome, _DORA, {"replace": 1})
        answers = Traffic(url, {"one": history}, changes).run(sizes, changers=1)
        if left := remains(url):
            outcome.blame("left behind", str(left))
        call(url, "DELETE", "/v1/adapters/one?drain=30", timeout=PATIENCE)
        after = bytes_of_one(url, first)
        if after != before:
            outcome.blame("memory", f"{before} became {after}")
    Judge(Oracle(folders), {"one": history}, _LOAD_WAIT).judge(answers, outcome)
    return outcome


@contextmanager
def server(folder: Path, sizes: Sizes, *options: str) -> Iterator[str]:
    """Run a server whose memory holds half of the adapters, and give its address."""
    (folder / "sources").mkdir(exist_ok=True)
    save_base(folder, tokenizer(None, None))
    nbytes = sum(file.stat().st_size for file in (folder / "adapters").glob("*/*"))
    counts = [f"--max-requests={sizes.clients}", f"--slots={sizes.slots}", f"--host-bytes={max(nbytes // 2, 10**6)}B"]
    changes = ["--allow-runtime-adapters", f"--allow-source=file://{folder.resolve()}/sources/*"]
    fixed = ["--port=0", "--dtype=float32", "--threads=1"]
    with started(folder, *options, *counts, *changes, *fixed) as (_, url):
        yield url


def bytes_of_one(url: str, folder: Path) -> dict[str, float]:
    """Register an adapter as ``one``, ask for it, and return the bytes of adapters and the slots in use."""
    body = {"name": "one", "source": f"file://{folder.resolve()}", "wait": True}
    assert call(url, "POST", "/v1/adapters", body, timeout=PATIENCE).status == 201
    assert answered(url, Asked("one", None, (5, 6, 7), 2)).status == 200
    assert not remains(url)
    return {
        name: value
        for name, value in metrics(url).items()
        if name.startswith(("veneer_tier_bytes", "veneer_bank_slots"))
    }


def remains(url: str) -> dict[str, Any]:
    """Return whatever of the requests is left some time after all clients are gone."""
    end = time.monotonic() + 30
    while (left := _left(url)) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def _left(url: str) -> dict[str, Any]:
    figures = metrics(url)
    left: dict[str, Any] = {name: figures[name] for name in _IDLE if figures[name]}
    adapters = call(url, "GET", "/v1/adapters", timeout=PATIENCE).json["data"]
    return left | {entry["name"]: entry for entry in adapters if entry["requests"] or entry["state"] != "ready"}


def metrics(url: str) -> dict[str, float]:
    """Return name and labels -> value of all metrics."""
    lines = call(url, "GET", "/metrics", timeout=PATIENCE).body.decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def main() -> None:
    """Run both parts, and tell how often what happened."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in (("adapters", 1000), ("slots", 32), ("clients", 64), ("requests", 2000), ("changes", 400)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--requests-of-one", type=int, default=500)
    parser.add_argument("--replacements", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    of_one, replacements = given.pop("requests_of_one"), given.pop("replacements")
    sizes = Sizes(**given)
    one = Sizes(1, sizes.slots, sizes.clients, of_one, replacements, sizes.seed)
    outcomes = [_told(part, size) for part, size in ((many_adapters, sizes), (one_name, one))]
    sys.exit(any(outcome.faults for outcome in outcomes))


def _told(part: Any, sizes: Sizes) -> Outcome:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome: Outcome = part(Path(folder), sizes)
    print(f"{part.__name__}, {time.monotonic() - began:.0f} s")
    for kind, count in sorted(outcome.counts.items()):
        print(f"  {count:6} {kind}")
    for fault in outcome.faults:
        print(f"  FAULT {fault}")
    return outcome


if __name__ == "__main__":
    main()
