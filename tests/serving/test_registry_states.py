"""Any order of events: never the wrong version, never one dropped that is in use, and in the end nothing is left."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.serving.registry_world import World
from veneer.errors import UnsupportedError
from veneer.serving import fetch
from veneer.serving.auth import ANONYMOUS
from veneer.serving.fetch import digest_in
from veneer.serving.registry import RegistryOptions
from veneer.serving.registry_types import Use
from veneer.serving.serving_errors import (
    AdapterBusyError,
    AdapterExistsError,
    AdapterInvalidError,
    AdapterRemovedError,
    ModelNotFoundError,
    ServingError,
)

T = TypeVar("T")
NAMES = st.sampled_from(["a", "b", "acme/c"])
NUMBERS = st.integers(0, 3)
KEPT = 3
ROOM = 3


@dataclass
class Held:
    """A request under way: what it uses, and what ends it."""

    use: Use
    ends: AsyncExitStack


class Registering(RuleBasedStateMachine):
    """A registry beside a model of it: name -> its versions, and which of them is the current one."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.root = Path(tempfile.mkdtemp())
        self.digests: list[str] = []
        self.histories: dict[str, list[str]] = {}
        self.current: dict[str, str] = {}
        self.failed: set[str] = set()
        self.held: list[Held] = []

    def do(self, work: Awaitable[T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 5))

    @initialize()
    def open(self) -> None:
        self.world = self.new_world()
        self.do(self.world.registry.open())
        self.digests = [self.do(self.world.digest(number)) for number in range(4)]

    def new_world(self) -> World:
        return World(self.root, residents=ROOM, options=RegistryOptions(versions=KEPT), adapters=4)

    # -- events --------------------------------------------------------------------------------------------

    @rule(name=NAMES, number=NUMBERS, replace=st.booleans(), check=st.booleans())
    def register(self, name: str, number: int, replace: bool, check: bool) -> None:
        digest, last = self.digests[number], self.current.get(name)
        check = check and (digest in self.world.engine.loaded or self.has_room())
        work = self.world.register(name, number, replace=replace, check=check)
        if check and self.is_refused(digest):
            self.refused(work, AdapterInvalidError, AdapterExistsError)
            self.failed |= {name} - self.current.keys()
        elif last not in (None, digest) and not replace:
            self.refused(work, AdapterExistsError)
        else:
            info = self.do(work)
            assert info.current is not None
            assert info.current.digest == digest
            self.failed.discard(name)
            if last != digest:
                history = [d for d in self.histories.get(name, []) if d != digest]
                self.histories[name] = [*history[-KEPT + 1 :], digest]
                self.current[name] = digest

    @rule(name=NAMES, force=st.booleans(), drain=st.sampled_from([None, 0.0]))
    def remove(self, name: str, force: bool, drain: float | None) -> None:
        uses = [held for held in self.held if held.use.name == name and not held.use.revoked.is_set()]
        work = self.world.registry.remove(name, ANONYMOUS, drain=drain)
        if name in self.failed:
            assert self.do(work)
            self.failed.discard(name)
        elif name not in self.current:
            self.refused(work, ModelNotFoundError, AdapterRemovedError)
        elif uses and drain is None:
            self.refused(work, AdapterBusyError)
        else:
            assert self.do(work) == (not uses)
            del self.current[name], self.histories[name]
            for held in uses:
                held.use.revoked.set()  # to know it as one of the past

    @rule(name=NAMES, to=st.none() | NUMBERS)
    def roll_back(self, name: str, to: int | None) -> None:
        if name not in self.current or not self.has_room():
            return
        history = self.histories[name]
        earlier = history[: history.index(self.current[name])]
        target = (earlier[-1] if earlier else None) if to is None else self.digests[to]
        prefix = None if to is None else self.digests[to]
        work = self.world.registry.rollback(name, ANONYMOUS, to=prefix)
        if target not in history:
            self.refused(work, ModelNotFoundError)
        elif self.is_refused(target):
            self.refused(work, AdapterInvalidError)
        else:
            self.do(work)
            self.current[name] = target

    @rule(name=NAMES, number=st.none() | NUMBERS)
    def acquire(self, name: str, number: int | None) -> None:
        wanted = self.current.get(name) if number is None else self.digests[number]
        model = name if number is None else f"{name}@{wanted}"
        if wanted not in self.histories.get(name, []):
            kind = AdapterInvalidError if name in self.failed else ModelNotFoundError
            self.refused(self.entered(model), kind, AdapterRemovedError)
        elif self.is_refused(wanted):
            self.refused(self.entered(model), AdapterInvalidError)
        elif wanted in self.world.engine.loaded or self.has_room():
            held = self.do(self.entered(model))
            assert held.use.digest == wanted
            self.held.append(held)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.world.engine.running[held.use.digest or ""] -= 1
        self.do(held.ends.aclose())

    @rule(name=NAMES, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        if name in self.current and (not pinned or name == "a"):  # all pinned would leave no room

            async def work() -> None:
                self.world.registry.pin(name, ANONYMOUS, pinned=pinned)

            self.do(work())

    @rule(number=NUMBERS)
    def damage(self, number: int) -> None:
        self.world.engine.refused[self.digests[number]] = UnsupportedError("It has a gate.")

    @rule()
    def mend(self) -> None:
        self.world.engine.refused.clear()
        self.world.residency._failures._failures.clear()

    @rule(name=NAMES, number=NUMBERS)
    def cancel_a_registration(self, name: str, number: int) -> None:
        if name in self.current:
            return

        async def work() -> None:
            task = asyncio.ensure_future(self.world.register(name, number))
            await asyncio.sleep(0.001 * number)
            await self.world.registry.remove(name, ANONYMOUS)
            with suppress(AdapterRemovedError):  # it may have been ready just before
                await task
            with pytest.raises(AdapterRemovedError):
                self.world.registry.adapter(name, ANONYMOUS)

        if not self.world.engine.refused and self.has_room():
            self.do(work())
            self.failed.discard(name)

    @precondition(lambda self: not self.held)
    @rule()
    def restart(self) -> None:
        self.do(self.world.registry.close())
        assert not self.world.engine.faults
        self.failed.clear()
        self.world = self.new_world()
        self.do(self.world.registry.open())

    # -- helpers -------------------------------------------------------------------------------------------

    async def entered(self, model: str) -> Held:
        async with AsyncExitStack() as stack:
            use = stack.enter_context(self.world.registry.use(model, ANONYMOUS))
            assert use.digest is not None
            await stack.enter_async_context(self.world.residency.lease(use.digest))
            self.world.engine.running[use.digest] += 1
            return Held(use, stack.pop_all())

    def is_refused(self, digest: str | None) -> bool:
        return digest in self.world.engine.refused and digest not in self.world.engine.loaded

    def has_room(self) -> bool:
        """Tell whether one more can be loaded without waiting for a request to end."""
        pinned = self.world.registry._keeper.pinned
        return len({held.use.digest for held in self.held} | pinned) < ROOM

    async def all_is_done(self) -> None:
        await asyncio.gather(*self.world.store._tasks, return_exceptions=True)
        await asyncio.sleep(0)
        await self.world.settled()

    def refused(self, work: Awaitable[Any], *kinds: type[ServingError]) -> None:
        with pytest.raises(kinds):
            self.do(work)

    # -- what always holds ---------------------------------------------------------------------------------

    @invariant()
    def what_is_in_use_is_loaded_and_whole(self) -> None:
        for held in self.held:
            adapter = held.use.adapter
            assert adapter is not None
            assert held.use.digest in self.world.engine.loaded
            assert digest_in(adapter.folder, adapter.files) == held.use.digest

    @invariant()
    def names_are_what_the_model_says(self) -> None:
        if not self.digests:
            return
        infos = {i.name: i for i in self.world.registry.adapters(ANONYMOUS) if i.current and i.state != "draining"}
        assert {name: info.current.digest for name, info in infos.items() if info.current} == self.current
        for name, info in infos.items():
            assert [version.digest for version in info.versions] == self.histories[name]

    @invariant()
    def limits_hold_and_the_engine_was_told_nothing_wrong(self) -> None:
        if self.digests:
            assert not self.world.engine.faults
            assert self.world.engine.most <= ROOM

    def teardown(self) -> None:
        while self.digests and self.held:
            held = self.held.pop()
            self.world.engine.running[held.use.digest or ""] -= 1
            self.do(held.ends.aclose())
        for name in list(self.current):
            assert self.do(self.world.registry.remove(name, ANONYMOUS))
        if self.digests:
            self.do(self.all_is_done())
            assert not self.world.engine.loaded
            assert not self.world.engine.faults
            assert self.world.folders() == set()
            assert len(self.world.registry._keeper) == len(self.world.residency) == self.world.store.used_bytes == 0
            self.do(self.world.registry.close())
        self.loop.close()
        shutil.rmtree(self.root)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "flush", lambda path: None)


TestRegistering = Registering.TestCase
TestRegistering.settings = settings(
    max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
