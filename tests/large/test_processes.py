"""Bases that are spread over processes: tensor parallelism and FSDP2, on two processes of this machine."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from tests.large.processes import CHECKS, spawn
from tests.random_adapters import adapted, saved_base
from veneer.errors import AdapterError

pytest.importorskip("transformers.distributed")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have left how each check ended."""
    root = tmp_path_factory.mktemp("processes")
    saved_base(root / "base")
    with contextlib.suppress(torch.multiprocessing.ProcessExitedException):
        spawn(root)
    return root


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_processes(check: str, ended: Path) -> None:
    said = {path.name: path.read_text() for path in ended.glob(f"{check} *")}
    assert said
    assert not any(said.values()), "\n".join(said.values())
    assert len(said) == 2


def test_empty_tensors_are_not_saved(tmp_path: Path) -> None:
    model = adapted()
    for parameter in model.adapters.parameters("default"):
        parameter.data = torch.empty(0)
    with pytest.raises(AdapterError, match="empty in this process"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
