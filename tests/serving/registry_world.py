"""A registry with a store and an engine of its own, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from tests.serving.strict_engine import StrictEngine
from tests.serving.tiny_adapters import write_adapter
from veneer.serving.auth import ANONYMOUS, Caller
from veneer.serving.registry import Registry, RegistryOptions
from veneer.serving.registry_types import AdapterInfo, Registration
from veneer.serving.residency import Residency, ResidencyLimits
from veneer.serving.source_policy import SourcePolicy
from veneer.serving.store import Store, StoreLimits


class World:
    """A registry, what is below it, and adapters to register: number -> folder."""

    def __init__(
        self,
        root: Path,
        *,
        limits: StoreLimits | None = None,
        residents: int | None = None,
        options: RegistryOptions | None = None,
        adapters: int = 3,
    ) -> None:
        self.root, self.time = root, 1000.0
        self.sources = [write_adapter(root / "sources" / str(number), number) for number in range(adapters)]
        self.engine = StrictEngine()
        self.store = Store(root / "store", limits)
        self.residency = Residency(self.engine, self.store, ResidencyLimits(adapters=residents, cycle=0.05))
        self.registry = Registry(
            self.store,
            self.residency,
            SourcePolicy((f"file://{root}/sources/*",)),
            options,
            base_name="base",
            clock=lambda: self.time,
        )

    async def register(self, name: str, number: int = 0, caller: Caller = ANONYMOUS, **options: Any) -> AdapterInfo:
        return await self.registry.register(Registration(name, str(self.sources[number]), **options), caller)

    async def digest(self, number: int) -> str:
        info = await self.register("digest", number)
        await self.registry.remove("digest", ANONYMOUS)
        assert info.current is not None
        return info.current.digest

    async def ask(self, name: str, caller: Caller = ANONYMOUS, seconds: float = 0.0) -> str | None:
        """Use a name as a request does, and return the digest that answered."""
        with self.registry.use(name, caller) as use:
            if use.digest is None:
                return None
            async with self.residency.lease(use.digest):
                assert use.digest in self.engine.loaded
                self.engine.running[use.digest] += 1
                await asyncio.sleep(seconds)
                assert use.digest in self.engine.loaded
                assert use.adapter is not None
                assert use.adapter.folder.is_dir()
                self.engine.running[use.digest] -= 1
            return use.digest

    async def settled(self) -> None:
        await self.registry._keeper.settled()

    def folders(self) -> set[str]:
        return {path.name for path in (self.root / "store").iterdir() if path.is_dir()}


def run(world: World, work: Awaitable[object]) -> None:
    """Open the registry, do the work and close it; the engine must have been told nothing wrong."""

    async def whole() -> None:
        await world.registry.open()
        try:
            await asyncio.wait_for(work, 60)  # type: ignore[arg-type]
        finally:
            await world.registry.close()

    asyncio.run(whole())
    assert not world.engine.faults
