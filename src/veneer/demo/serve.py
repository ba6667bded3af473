"""``make demo-serve``: three clients at once under three adapters, and a fourth adapter, loaded while they talk."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from veneer.demo.base import demo_base
from veneer.demo.script import QUESTIONS, SHIPPED, DemoError
from veneer.errors import VeneerError

FIRST = ("pirate", "brief", "json")
LATER = "pirate-json"
_TOKENS = 40
# The server is there when it prints this and its address.
_SERVING = "Serving on "


@dataclass
class Conversation:
    """What one client asks under one adapter, and what it is answered.

    Attributes:
        adapter: its name.
        lines: questions and answers so far.
        version: as the answers' header names it.
        tokens: of all answers.
        begin, end: of the answers.
    """

    adapter: str
    lines: list[str] = field(default_factory=list)
    version: str = ""
    tokens: int = 0
    begin: float = 0.0
    end: float = 0.0

    def ask(self, address: str, question: str) -> None:
        """Ask, and note the answer as it comes."""
        self.lines += [f"> {question}", ""]
        body = {
            "model": self.adapter,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": _TOKENS,
            "temperature": 0,
            "stream": True,
        }
        self.begin = self.begin or time.monotonic()
        with post(f"{address}/v1/chat/completions", body) as response:
            self.version = response.headers["x-veneer-adapter"]
            for chunk in _chunks(response):
                text = chunk["choices"][0]["delta"].get("content", "")
                self.tokens += bool(text)
                self.lines[-1] += text
        self.end = time.monotonic()

    def panel(self) -> Panel:
        """Show it."""
        name, _, digest = self.version.partition("@")
        rate = f", {self.tokens / (self.end - self.begin):.0f} tokens/s" if self.end > self.begin else ""
        title = f"{name or self.adapter} {digest[7:15]}{rate}"
        return Panel(Text("\n".join(self.lines)), title=Text(title), width=38, title_align="left")


def post(address: str, body: Any) -> Any:
    """Send JSON, and return the response."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"content-type": "application/json"})
    return urllib.request.urlopen(request, timeout=120)


def _chunks(response: Any) -> Iterator[Any]:
    """Yield the chunks of a stream."""
    for line in response:
        if line.startswith(b"data: [DONE]"):
            return
        if line.startswith(b"data: "):
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise DemoError(chunk["error"]["message"])
            yield chunk


@contextmanager
def server(base: Path, later: Path) -> Iterator[str]:
    """Run ``veneer serve``, and yield its address."""
    adapters = [f"--adapter={name}={SHIPPED / name}" for name in FIRST]
    options = ["--port=0", "--max-context=512", "--allow-runtime-adapters", f"--allow-source=file://{later.parent}/*"]
    command = [sys.executable, "-m", "veneer", "serve", str(base), *adapters, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield _address(process)
        finally:
            process.terminate()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="")
        if line.startswith(_SERVING):
            return line.removeprefix(_SERVING).strip()
    raise DemoError("The server did not start. Run `veneer serve` to see why.")


def combined(base: Path, folder: Path) -> Path:
    """Make the fourth adapter of two that are shipped."""
    from veneer.merging.combine_folders import combine

    weights: dict[str | Path, float] = {SHIPPED / "json": 1.0, SHIPPED / "pirate": 1.0}
    combine(weights, base, out=folder / LATER, combination_type="cat")
    return folder / LATER


def main() -> None:
    """Run the demo."""
    base = demo_base()
    with tempfile.TemporaryDirectory() as folder:
        later = combined(base, Path(folder).resolve())
        with server(base, later) as address:
            _talk(address, later)


def _talk(address: str, later: Path) -> None:
    conversations = [Conversation(name) for name in FIRST]
    clients = [threading.Thread(target=_client, args=(address, conversation)) for conversation in conversations]
    console = Console()
    with Live(console=console, refresh_per_second=8, transient=not console.is_terminal) as live:
        begin = time.monotonic()
        for client in clients:
            client.start()
        _until(lambda: all(conversation.tokens for conversation in conversations), live, conversations)
        loaded = _register(address, later)
        fourth = Conversation(LATER)
        conversations.append(fourth)
        clients.append(threading.Thread(target=_client, args=(address, fourth)))
        clients[-1].start()
        _until(lambda: not any(client.is_alive() for client in clients), live, conversations)
        seconds = time.monotonic() - begin
    if not console.is_terminal:
        console.print(_shown(conversations))
    _check(conversations)
    tokens = sum(conversation.tokens for conversation in conversations)
    print(f"{LATER} was fetched, checked and loaded in {loaded * 1000:.0f} ms, while the others were answered.")
    print(
        f"{tokens} tokens for {len(conversations)} clients in {seconds:.1f} s, {tokens / seconds:.0f} a second in all."
    )


def _client(address: str, conversation: Conversation) -> None:
    for question in QUESTIONS:
        conversation.ask(address, question)


def _until(reached: Any, live: Live, conversations: list[Conversation]) -> None:
    while not reached():
        live.update(_shown(conversations))
        time.sleep(0.05)
    live.update(_shown(conversations))


def _shown(conversations: list[Conversation]) -> Group:
    return Group(Columns([conversation.panel() for conversation in conversations]))


def _register(address: str, later: Path) -> float:
    begin = time.monotonic()
    body = {"name": LATER, "source": f"file://{later}", "wait": True}
    with post(f"{address}/v1/adapters", body) as response:
        response.read()
    return time.monotonic() - begin


def _check(conversations: list[Conversation]) -> None:
    """Fail where a client was not answered under its adapter, or two were answered alike."""
    for conversation in conversations:
        if not conversation.version.startswith(f"{conversation.adapter}@sha256:"):
            raise DemoError(f"{conversation.adapter} was answered by {conversation.version or 'nothing'}.")
    if len({"\n".join(conversation.lines) for conversation in conversations}) < len(conversations):
        raise DemoError("Two adapters gave the same answers.")


if __name__ == "__main__":
    try:
        main()
    except VeneerError as error:
        sys.exit(f"error: {error}")
