"""Two replicas on Ray: right answers under every adapter, and one that is killed loses only what it runs."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.serving.http_service import call
from tests.serving.served_process import NAMES, ServedProcess, ask, check, check_many, made, process
from veneer.adapters.slot_table import slot_capacity
from veneer.errors import UnsupportedError
from veneer.serving.engine import EngineOptions
from veneer.serving.engine_types import EngineRequest, Sampling
from veneer.serving.replica_types import ReplicaOptions
from veneer.serving.replicated_engine import ReplicatedEngine

ray: Any = pytest.importorskip("ray", reason="needs the extra `ray`")

# Ray leaves sockets open, and names things by their old names.
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = ("--replicas=2", "--replica-cpus=0.5")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedProcess]:
    folder = tmp_path_factory.mktemp("r")
    with process(made(folder), folder, *SIZES) as served:
        yield served


@pytest.fixture
def slow() -> Iterator[ReplicatedEngine]:
    """Two replicas whose engines take two seconds for a token."""
    from tests.serving.slow_replica import SlowReplica
    from veneer.serving.ray_cluster import RayCluster

    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    cluster = RayCluster("slow/base", "base", EngineOptions(), ReplicaOptions(2, cpus=0.5), SlowReplica)
    engine = ReplicatedEngine(cluster, 8, slot_capacity(4, (8, 16, 64)))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(0)
        assert ray.is_initialized(), "who began it ends it"
        ray.shutdown()


def wait_for(condition: Callable[[], Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_cancelling_refusing_and_replacing(slow: ReplicatedEngine, tmp_path: Path) -> None:
    async def first(number: int) -> Any:
        events = slow.generate(EngineRequest(str(number), (5, 6), None, Sampling(max_tokens=30)))
        event = await anext(events)
        await asyncio.to_thread(wait_for, lambda: slow.status().running == 1, 5)
        await events.aclose()
        return event

    async def given_up() -> None:
        task = asyncio.create_task(first(2))
        await asyncio.to_thread(wait_for, lambda: slow.status().running == 1, 5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    # A closed answer, and one that is given up before its first token, would take a minute.
    assert asyncio.run(first(1)).token is not None
    wait_for(lambda: slow.status().running == 0, 3)
    asyncio.run(given_up())
    wait_for(lambda: slow.status().running == 0, 3)
    # What the engine refuses is told in its words.
    with pytest.raises(UnsupportedError, match=r"It is a prompt\. Merge it\."):
        asyncio.run(slow.load("refused", tmp_path))
    # An engine that stays dead is replaced with its process, and the other goes on.
    asyncio.run(slow.load("fatal", tmp_path))
    assert [replica.is_up for replica in slow._router.replicas].count(True) == 1
    assert asyncio.run(first(3)).token is not None
    wait_for(lambda: all(replica.is_up for replica in slow._router.replicas), 30)


def replicas(served: ServedProcess) -> list[psutil.Process]:
    """Return the processes of the engines."""
    below = psutil.Process(served.process.pid).children(recursive=True)
    return [one for one in below if "ServeReplica:veneer-base:engine-" in "".join(one.cmdline())]


def test_answers_of_two_replicas_are_those_of_one_model(server: ServedProcess) -> None:
    assert len(replicas(server)) == 2
    check_many(server, 40)


def test_a_replica_that_is_killed_loses_only_what_it_runs(server: ServedProcess) -> None:
    names = [*NAMES, "base"]
    asked = [(names[i % 5], [5, 6, 7 + i % 5], 60) for i in range(200)]
    for name, prompt, tokens in asked[:25]:
        server.text(None if name == "base" else name, prompt, tokens)
    victim = replicas(server)[0]
    with ThreadPoolExecutor(8) as clients:
        running = [clients.submit(ask, server, *one) for one in asked]
        wait_for(lambda: sum(one.done() for one in running) >= 20, 60)
        os.kill(victim.pid, signal.SIGKILL)
        replies = [one.result() for one in running]
    lost = [reply for reply in replies if reply.status != 200]
    assert {reply.status for reply in lost} <= {503}
    assert {reply.headers["retry-after"] for reply in lost} <= {"2"}
    assert len(lost) <= 8
    for reply, one in zip(replies, asked, strict=True):
        if reply.status != 503:
            check(server, reply, *one)
    assert call(server.url, "GET", "/health").status == 200
    wait_for(lambda: len(replicas(server)) == 2, 30)


def test_adapters_come_and_go_for_all_replicas_at_once(server: ServedProcess) -> None:
    source = shutil.copytree(
        server.world.folders["r16"], server.folder / "sources" / "late", ignore=shutil.ignore_patterns(*NAMES)
    )
    body = {"name": "late", "source": f"file://{source.resolve()}", "wait": True}
    assert call(server.url, "POST", "/v1/adapters", body, timeout=60).status == 201
    with ThreadPoolExecutor(12) as clients:
        replies = list(clients.map(lambda _: ask(server, "late", [5, 6, 7], 20), range(24)))
    expected = server.text("r16", [5, 6, 7], 20)
    assert [reply.json["choices"][0]["text"] for reply in replies] == [expected] * 24
    assert call(server.url, "DELETE", "/v1/adapters/late?drain=20", timeout=60).status == 204
    assert ask(server, "late", [5], 2).status == 410


def test_it_listens_on_this_machine_but_for_the_port_that_serve_gives_a_replica(server: ServedProcess) -> None:
    def open_to_others() -> list[int]:
        return [
            process.pid
            for process in psutil.Process(server.process.pid).children(recursive=True)
            for connection in process.net_connections("inet")
            if connection.status == "LISTEN" and connection.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
        ]

    # One in the place of a replica that was ended may still be loading the base.
    wait_for(lambda: sorted(open_to_others()) == sorted(one.pid for one in replicas(server)), 30)


def test_it_ends_with_its_cluster(server: ServedProcess) -> None:
    below = psutil.Process(server.process.pid).children(recursive=True)
    assert len(below) > 4
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    _, alive = psutil.wait_procs(below, 10)
    assert not alive
