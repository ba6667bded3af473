"""From disk to disk, every kind of layer and of change comes out as peft's load, merge and save has it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.merging.kinds import KINDS, Made, make
from tests.models import gap

pytestmark = pytest.mark.oracle

CLOSE = 1e-5


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(request.param, tmp_path_factory.mktemp("kind"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def test_it_computes_what_the_adapter_computes(made: Made, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = veneer.merge(made.adapter, made.base, out=tmp_path / "out")
    assert not [text for text in report.warnings if "shares its weight in the base" not in text]
    assert gap(made.read(made.load(tmp_path / "out")), made.unmerged) < CLOSE
    assert gap(made.read(veneer.load(tmp_path / "out")), made.unmerged) < CLOSE


def test_the_weights_are_those_that_peft_merges(made: Made, tmp_path: Path) -> None:
    if not made.kind.peer_saves:
        pytest.skip("peft 0.21 merges the change of a tied head into the embedding too, or loses it")
    veneer.merge(made.adapter, made.base, out=tmp_path / "out")
    ours, theirs, base = weights(tmp_path / "out"), weights(made.peer), weights(made.base)
    assert base.keys() <= ours.keys()
    assert theirs.keys() <= ours.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape
        assert gap(ours[name], tensor) < CLOSE, name
    figures = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())["tensors"]
    changed = {one["name"] for one in figures if one["change"]}
    # The parts of a fused parameter are counted together, under its name.
    apart = {name for name in ours if ".experts." in name}
    for name, tensor in ours.items():
        if name in base and name not in changed | apart:
            assert torch.equal(tensor, base[name]), name
        elif name in base and name in changed:
            assert not torch.equal(tensor, base[name]), name


def test_in_memory_it_is_the_same(made: Made, tmp_path: Path) -> None:
    veneer.merge(made.adapter, made.base, out=tmp_path / "out")
    live = veneer.load(made.adapter, base=made.base, merge=True)
    assert gap(made.read(live), made.read(made.load(tmp_path / "out"))) < CLOSE
