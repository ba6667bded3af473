"""An engine without a model that is strict about what it is told to load and drop."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from veneer.errors import EngineError, VeneerError
from veneer.serving.engine_types import EngineRequest, EngineStatus, LoadedVersion, TokenEvent


@dataclass
class StrictEngine:
    """Holds versions; a load or drop that its caller should know to be wrong is noted.

    Attributes:
        delay: seconds that a load takes.
        loaded: the versions that it holds.
        running: version -> requests under way.
        loads: version -> how often it was loaded.
        faults: what it should not have been told.
        late: version -> how many drops it refuses, since the last step of a request has not ended.
        refused: version -> why it cannot be loaded.
        nbytes: version -> the memory that it takes.
        folded_bytes: as the status tells them.
        most: the most versions that it held at once.
    """

    delay: float = 0.0
    max_context: int = 1000
    alive: bool = True
    restarts: int = 0
    loaded: dict[str, Path] = field(default_factory=dict)
    running: Counter[str] = field(default_factory=Counter)
    loads: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    late: Counter[str] = field(default_factory=Counter)
    refused: dict[str, VeneerError] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)
    nbytes: Counter[str] = field(default_factory=Counter)
    folded_bytes: int = 0
    most: int = 0

    def start(self) -> None:
        """Do nothing."""

    def stop(self, timeout: float) -> None:
        """Do nothing."""

    async def load(self, version: str, folder: Path) -> LoadedVersion:
        """Load."""
        if version in self.loaded and version not in self.quarantined:
            self.faults.append(f"{version} was loaded twice")
        await asyncio.sleep(self.delay)
        self.loads[version] += 1
        if version in self.refused:
            raise self.refused[version]
        if not (folder / "adapter_config.json").is_file():
            self.faults.append(f"{version} has no files")
        self.loaded[version] = folder
        self.quarantined.pop(version, None)
        self.most = max(self.most, len(self.loaded))
        return LoadedVersion(version, True, 0.0, self.nbytes[version], 8, 1)

    async def drop(self, version: str) -> None:
        """Drop."""
        await asyncio.sleep(self.delay / 2)
        if self.running[version]:
            self.faults.append(f"{version} was dropped under a request")
            raise EngineError("in use")
        if version not in self.loaded:
            raise EngineError("not loaded")
        if self.late[version]:
            self.late[version] -= 1
            raise EngineError("in use")
        del self.loaded[version]

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenEvent]:
        """Generate one token that tells the version."""
        version = request.version or ""
        if version and version not in self.loaded:
            self.faults.append(f"{version} was asked for and is not loaded")
            raise EngineError("not loaded")
        self.running[version] += 1
        try:
            for index in range(request.sampling.max_tokens):
                await asyncio.sleep(0)
                yield TokenEvent(index, version)
        finally:
            self.running[version] -= 1

    def status(self) -> EngineStatus:
        """Return the state."""
        return EngineStatus(
            self.alive,
            restarts=self.restarts,
            resident=tuple(self.loaded),
            quarantined=dict(self.quarantined),
            folded_bytes=self.folded_bytes,
        )
