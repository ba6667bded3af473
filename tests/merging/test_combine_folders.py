"""Adapters combined from folders: the tensors of ``add_weighted_adapter``, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import CONFIG, WEIGHTS, saved, saved_base
from veneer.errors import MergeError, OutputError, UnsupportedError, UsageError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("combine")
    saved_base(root / "base")
    saved(root / "default", seed=1, r=4)
    saved(root / "more" / "default", seed=2, r=2)
    return root


def combine(world: Path, out: Path, **options: Any) -> veneer.CombineReport:
    weights = {world / "default": 0.7, world / "more" / "default": -0.4}
    return veneer.combine(weights, world / "base", out=out, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cat", {}),
        ("linear", {}),
        ("svd", {"svd_rank": 3}),
        ("magnitude_prune", {"density": 0.5}),
        ("ties", {"density": 0.5, "majority_sign_method": "frequency"}),
        ("ties_svd", {"density": 0.5}),
        ("dare_linear", {"density": 0.5, "seed": 3}),
        ("dare_ties", {"density": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_tensors_of_add_weighted_adapter(kind: str, options: dict[str, Any], world: Path, tmp_path: Path) -> None:
    report = combine(world, tmp_path / "out", combination_type=kind, **options)
    model = veneer.load(world / "default", base=world / "base", adapter_name="a")
    model.load_adapter(world / "more" / "default", "b")
    seed = {"seed": 0} if "dare" in kind else {}
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "both", kind, **{**seed, **options})
    model.save_pretrained(tmp_path / "memory", selected_adapters=["both"])
    expected, found = load_file(tmp_path / "memory" / "both" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (report.rank, report.combination_type) == (config["r"], kind)
    assert report.nbytes == (tmp_path / "out" / WEIGHTS).stat().st_size
    assert list(report.adapters.values()) == [0.7, -0.4]
    again = veneer.load(tmp_path / "out")  # its config names the base
    model.set_adapter("both")
    assert gap(logits(again, inputs("llama")), logits(model, inputs("llama"))) < 1e-6
    assert "`default`: LORA" in (tmp_path / "out" / "README.md").read_text()


def test_other_methods_and_a_set_are_combined(world: Path, tmp_path: Path) -> None:
    config = veneer.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = veneer.get_peft_model(build("llama"), config, seed=1)
    model.save_pretrained(tmp_path / "ia3")
    pair = [world / "default", tmp_path / "ia3"]
    with pytest.raises(UnsupportedError, match="svd_rank"):
        veneer.combine([tmp_path / "ia3"], world / "base", out=tmp_path / "none", combination_type="cat")
    assert not (tmp_path / "none").exists()
    assert veneer.combine(pair, world / "base", out=tmp_path / "out", svd_rank=5).rank == 5
    members = veneer.load(world / "default", base=world / "base", adapter_name="a")
    members.load_adapter(world / "more" / "default", "b")
    members.set_adapter(["a", "b"])
    members.save_pretrained(tmp_path / "set")
    both = veneer.combine(tmp_path / "set", world / "base", out=tmp_path / "sum", combination_type="cat")
    assert both.rank == 6
    expected = logits(members, inputs("llama"))
    assert gap(logits(veneer.load(tmp_path / "sum"), inputs("llama")), expected) < 1e-5


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"combination_type": "svd", "density": 0.5}, "svd takes no density"),
        ({"combination_type": "cat", "seed": 1}, "cat takes no seed"),
        ({"combination_type": "dare_linear", "density": 0.5, "majority_sign_method": "total"}, "takes no majority"),
        ({"combination_type": "ties", "density": 0.5, "seed": 1}, "ties takes no seed"),
        ({"combination_type": "ties"}, "needs density"),
        ({"combination_type": "ties", "density": 1.5}, "needs density"),
        ({"combination_type": "tie"}, "Unknown combination_type"),
        ({"svd_rank": 0}, "is no rank"),
    ],
)
def test_an_option_that_is_wrong_or_of_another_type_is_refused(
    options: dict[str, Any], why: str, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=why):
        combine(world, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_wrong_weight_a_repetition_and_a_model_are_refused(world: Path, tmp_path: Path) -> None:
    adapter = world / "default"
    with pytest.raises(UsageError, match="nan is no weight"):
        veneer.combine({adapter: float("nan")}, world / "base", out=tmp_path / "out")
    with pytest.raises(UsageError, match="given twice"):
        veneer.combine([adapter, adapter], world / "base", out=tmp_path / "out")
    with pytest.raises(MergeError, match="is a full model"):
        veneer.combine([world / "base"], out=tmp_path / "out")
    with pytest.raises(MergeError, match="no adapter"):
        veneer.combine([], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_replaced_only_on_request_and_only_by_an_adapter(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    combine(world, out)
    with pytest.raises(OutputError, match="not empty"):
        combine(world, out)
    assert combine(world, out, combination_type="cat", overwrite=True).rank == 6
    assert veneer.load(out).peft_config["default"].r == 6
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    for folder, why in ((tmp_path / "mine", "holds no adapter"), (world / "default", "is the adapter itself")):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(OutputError, match=why):
            combine(world, folder, overwrite=True)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
