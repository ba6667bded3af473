"""A ``veneer serve`` of its own process, with a tiny base and adapters of several methods, and the oracle for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.serving.engine_world import CONFIGS, World, base, prompts, tokenizer
from tests.serving.fake_engine import TEMPLATE
from tests.serving.http_service import Reply, call, events_of

NAMES = ("r3", "r16", "dora", "ia3")
ROOT = Path(__file__).parents[2]


@dataclass
class ServedProcess:
    """A server's process.

    Attributes:
        url: its address.
        process: of the system.
        world: the oracle.
        folder: with ``base/``, ``adapters/`` and ``sources/``, from which adapters may come.
    """

    url: str
    process: subprocess.Popen[str]
    world: World
    folder: Path

    def text(self, name: str | None, prompt: list[int], tokens: int) -> str:
        """Return what ``generate`` answers."""
        answer = self.world.answer(name, prompt, tokens)
        return str(tokenizer().decode(answer, skip_special_tokens=True))


def save_base(folder: Path, words: Any) -> None:
    """Save the base, with a tokenizer."""
    words.chat_template = TEMPLATE
    base().save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")


def made(folder: Path) -> World:
    """Make the folders."""
    save_base(folder, tokenizer())
    world = World(folder / "adapters", {name: CONFIGS[name] for name in NAMES})
    (folder / "sources").mkdir()
    return world


@contextmanager
def process(world: World, folder: Path, *options: str) -> Iterator[ServedProcess]:
    """Run the server until the block ends."""
    adapters = [f"--adapter={name}={world.folders[name]}" for name in NAMES]
    sizes = ["--port=0", "--dtype=float32", "--max-requests=8", "--slots=4", "--kv-bytes=1MB", "--threads=1"]
    changes = ["--allow-runtime-adapters", f"--allow-source=file://{folder.resolve()}/sources/*"]
    with started(folder, *adapters, *sizes, *changes, *options) as (running, url):
        yield ServedProcess(url, running, world, folder)


@contextmanager
def started(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server of the base in a folder until the block ends, and give its process and address."""
    command = [sys.executable, "-m", "veneer", "serve", str(folder / "base"), *options]
    log = (folder / "log").open("w")
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment(folder))
    try:
        yield running, _address(running, folder)
    finally:
        running.kill()
        running.wait()
        assert running.stdout is not None
        running.stdout.close()
        log.close()


def environment(folder: Path) -> dict[str, str]:
    """Return the environment: no network, this source, temporary files in the test's folder."""
    paths = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}


def _address(running: subprocess.Popen[str], folder: Path) -> str:
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("Serving on "):
            return line.removeprefix("Serving on ").strip()
    raise RuntimeError((folder / "log").read_text())


def ask(served: ServedProcess, name: str, prompt: list[int], tokens: int, **more: Any) -> Reply:
    """Return the server's answer to a completion."""
    return call(served.url, "POST", "/v1/completions", completion(name, prompt, tokens, **more), timeout=60)


def check(served: ServedProcess, reply: Reply, name: str, prompt: list[int], tokens: int) -> None:
    """Compare an answer, streamed or not, with the oracle's."""
    assert reply.status == 200, reply.body
    assert reply.headers["x-veneer-adapter"].startswith(f"{name}@sha256:" if name != "base" else "base")
    if reply.headers["content-type"] == "text/event-stream":
        events = events_of(reply)
        assert events[-1] == "[DONE]"
        text = "".join(event["choices"][0]["text"] for event in events[:-1])
    else:
        text = reply.json["choices"][0]["text"]
    assert text == served.text(None if name == "base" else name, prompt, tokens)


def check_many(served: ServedProcess, count: int) -> None:
    """Ask for so many completions by twelve clients, half of them streamed, and check each."""
    names = [*NAMES, "base"]
    asked = [(names[i % 5], prompt, 4 + i % 9, i % 2 == 1) for i, prompt in enumerate(prompts(count))]
    for name, prompt, tokens, _ in asked:
        served.text(None if name == "base" else name, prompt, tokens)
    with ThreadPoolExecutor(12) as clients:
        replies = list(clients.map(lambda a: ask(served, a[0], a[1], a[2], stream=a[3]), asked))
    for reply, (name, prompt, tokens, _) in zip(replies, asked, strict=True):
        check(served, reply, name, prompt, tokens)


def completion(name: str, prompt: list[int], tokens: int, **more: Any) -> dict[str, Any]:
    """Return the body of a request whose answer is the oracle's."""
    return {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}
