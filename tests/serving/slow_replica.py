"""A replica for Ray whose engine has no model: it is slow, refuses one adapter, and dies of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.serving.fake_replicas import FakeServedEngine
from veneer.errors import UnsupportedError
from veneer.serving import replica
from veneer.serving.engine_types import LoadedVersion
from veneer.serving.replica import EngineReplica


class SlowEngine(FakeServedEngine):
    """Refuses the adapter ``refused``, and is dead once it has loaded ``fatal``."""

    async def load(self, version: str, folder: Path) -> LoadedVersion:
        """Load."""
        if version == "refused":
            raise UnsupportedError("It is a prompt.", hint="Merge it.")
        self.dead = version == "fatal"
        return await super().load(version, folder)


class SlowReplica(EngineReplica):
    """Takes two seconds for a token, and is replaced soon after its death."""

    def __init__(self, *given: Any) -> None:
        replica._DEAD_SECONDS = 0.5
        super().__init__(SlowEngine(delay=2.0))
