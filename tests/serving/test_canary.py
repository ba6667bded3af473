"""The check of each version: in half precision rounding passes, and the base in an adapter's place does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.serving.engine_world import CONFIGS, World, base, run, running
from veneer.errors import AdapterError
from veneer.serving.canary import Canary


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("adapters"), {"r3": CONFIGS["r3"]})


def shifted(share: float) -> object:
    """Return a mixed batch that lies so far from the adapter as ``share`` of the way to the base."""

    def mixed(self: Canary, adapter: str) -> Tensor:
        alone = self._alone(adapter)
        return alone + share * (self.base - alone)

    return mixed


@pytest.mark.parametrize(
    ("dtype", "share", "served"),
    [
        (torch.bfloat16, 0.5, True),
        (torch.bfloat16, 1.0, False),
        (torch.float32, 0.0, True),
        (torch.float32, 0.5, False),
    ],
)
def test_a_version_is_served_where_only_rounding_differs(
    dtype: torch.dtype, share: float, served: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Canary, "_mixed", shifted(share))
    folder: Path = world.folders["r3"]
    with running(model=base().to(dtype)) as engine:
        if served:
            assert run(engine.load("r3", folder)).changes_output
        else:
            with pytest.raises(AdapterError, match="other logits in a mixed batch"):
                run(engine.load("r3", folder))
            assert not engine.resident
