"""Registers, replaces, rolls back and removes adapters of a server at random, and checks what it answers to that."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.serving.http_service import Reply, call
from tests.serving.identity_client import PATIENCE
from tests.serving.identity_verdict import Outcome
from tests.serving.many_adapters import FILES, write_adapter
from tests.serving.name_history import NameHistory

# What is done to a name that is registered, and how often.
KINDS = {
    "replace": 6,
    "roll back": 3,
    "roll back to": 1,
    "remove": 1,
    "drain": 2,
    "force": 2,
    "clash": 1,
    "damage": 1,
    "pin": 1,
    "unpin": 1,
    "warm": 1,
}
_FIRST_SEED = 1_000_000


@dataclass
class Changes:
    """Makes changes, each of a name that nothing else changes meanwhile.

    Attributes:
        url: of the server.
        sources: the folder where new adapters are written, which the server may read.
        folders: digest -> the folder of an adapter.
        shared: the seeds of adapters whose bytes a name may get, though another has them.
        outcome: told what happens.
        form: the seed of the config that all new adapters have; each has its own when ``None``.
        kinds: kind of change -> how often it is made.
    """

    url: str
    sources: Path
    folders: dict[str, Path]
    shared: range
    outcome: Outcome
    form: int | None = None
    kinds: Mapping[str, int] = field(default_factory=lambda: KINDS)
    _seeds: Any = field(default_factory=lambda: itertools.count(_FIRST_SEED))

    def make(self, name: str, history: NameHistory, chance: random.Random) -> None:
        """Change a name; one that is not registered comes to be."""
        kind = "register"
        if history.current is not None:
            kind = chance.choices(list(self.kinds), list(self.kinds.values()))[0]
        reply = _MAKERS[kind](self, name, history, chance)
        if reply is not None:
            self.outcome.blame("unexplained", f"{kind} {name}: {reply.status} {reply.body.decode()[:400]}")

    # Each of these returns the answer where it is not the one that is due.

    def _register(self, name: str, history: NameHistory, chance: random.Random) -> Reply | None:
        return self._registered(name, history, chance, "registered")

    def _replace(self, name: str, history: NameHistory, chance: random.Random) -> Reply | None:
        return self._registered(name, history, chance, "replaced", replace=True)

    def _registered(
        self, name: str, history: NameHistory, chance: random.Random, done: str, **more: Any
    ) -> Reply | None:
        folder, digest = self._written(chance.choice(self.shared) if chance.random() < 0.2 else None)
        self.folders.setdefault(digest, folder)
        began = time.monotonic()
        reply = self._ask_to_register(name, folder, **more)
        if reply.status != 201 or reply.json["digest"] != digest:
            return reply
        history.registered(digest, began, time.monotonic())
        self.outcome.counts[done] += 1
        return None

    def _clash(self, name: str, history: NameHistory, chance: random.Random) -> Reply | None:
        folder, _ = self._written()
        reply = self._ask_to_register(name, folder)
        return self._refused(reply, reply.status == 409, "another version without replace")

    def _damage(self, name: str, history: NameHistory, chance: random.Random) -> Reply | None:
        folder, _ = self._written()
        tensors = folder / FILES[1]
        tensors.write_bytes(tensors.read_bytes()[:-64])
        reply = self._ask_to_register(name, folder, replace=True)
        return self._refused(reply, reply.status == 422, "damaged")

    def _roll_back(self, name: str, history: NameHistory, chance: random.Random) -> Reply | None:
        return self._rolled_back(name, history, history.previous, {})

    def _roll_back_to(self, name: str, history: NameHistory, chance: random.Random) -> Reply | None:
        digest = chance.choice(history.versions)
        return self._rolled_back(name, history, digest, {"to": digest})

    def _rolled_back(self, name: str, history: NameHistory, digest: str | None, body: dict[str, Any]) -> Reply | None:
        began = time.monotonic()
        reply = call(self.url, "POST", f"/v1/adapters/{name}/rollback", body, timeout=PATIENCE)
        if digest is None:
            return self._refused(reply, reply.status == 404, "no earlier version")
        if reply.status != 200 or reply.json["digest"] != digest:
            return reply
        history.rolled_back(digest, began, time.monotonic())
        self.outcome.counts["rolled back"] += 1
        return None

    def _remove(self, name: str, history: NameHistory, chance: random.Random) -> Reply | None:
        began = time.monotonic()
        reply = call(self.url, "DELETE", f"/v1/adapters/{name}", timeout=PATIENCE)
        if reply.status == 409:
            return self._refused(reply, history.might_be_used(began, time.monotonic()), "busy")
        return self._removed(history, began, reply, "removed")

    def _drain(self, name: str, history: NameHistory, chance: random.Random) -> Reply | None:
        began = time.monotonic()
        reply = call(self.url, "DELETE", f"/v1/adapters/{name}?drain=60", timeout=PATIENCE)
        return self._removed(history, began, reply, "removed when idle")

    def _force(self, name: str, history: NameHistory, chance: random.Random) -> Reply | None:
        began = time.monotonic()
        reply = call(self.url, "DELETE", f"/v1/adapters/{name}?force=true", timeout=PATIENCE)
        return self._removed(history, began, reply, "removed by force")

    def _removed(self, history: NameHistory, began: float, reply: Reply, done: str) -> Reply | None:
        if reply.status != 204:
            return reply
        history.removed(began, time.monotonic(), done == "removed by force")
        self.outcome.counts[done] += 1
        return None

    def _pin(self, name: str, history: NameHistory, chance: random.Random) -> Reply | None:
        return self._kept(name, "pin")

    def _unpin(self, name: str, history: NameHistory, chance: random.Random) -> Reply | None:
        return self._kept(name, "unpin")

    def _warm(self, name: str, history: NameHistory, chance: random.Random) -> Reply | None:
        return self._kept(name, "warm")

    def _kept(self, name: str, how: str) -> Reply | None:
        reply = call(self.url, "POST", f"/v1/adapters/{name}/{how}", {}, timeout=PATIENCE)
        if reply.status != 200:
            return reply
        self.outcome.counts["pinned, unpinned or warmed"] += 1
        return None

    def _refused(self, reply: Reply, is_due: bool, why: str) -> Reply | None:
        if not is_due:
            return reply
        self.outcome.counts[f"changes refused: {why}"] += 1
        return None

    def _written(self, seed: int | None = None) -> tuple[Path, str]:
        """Write an adapter, and return its folder and digest."""
        number = next(self._seeds)
        folder = self.sources / str(number)
        return folder, write_adapter(folder, number if seed is None else seed, self.form)

    def _ask_to_register(self, name: str, folder: Path, **more: Any) -> Reply:
        body = {"name": name, "source": f"file://{folder.resolve()}", "wait": True, **more}
        return call(self.url, "POST", "/v1/adapters", body, timeout=PATIENCE)


_MAKERS: Mapping[str, Callable[[Changes, str, NameHistory, random.Random], Reply | None]] = {
    "register": Changes._register,
    "replace": Changes._replace,
    "clash": Changes._clash,
    "damage": Changes._damage,
    "roll back": Changes._roll_back,
    "roll back to": Changes._roll_back_to,
    "remove": Changes._remove,
    "drain": Changes._drain,
    "force": Changes._force,
    "pin": Changes._pin,
    "unpin": Changes._unpin,
    "warm": Changes._warm,
}
