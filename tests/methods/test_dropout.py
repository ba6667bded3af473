"""Dropout of whole patches, of rows and of blocks: on while training, off otherwise, and none of it in a merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from tests.methods.case import Case
from tests.methods.networks import NETWORKS
from tests.methods.test_contract import scrambled
from tests.models import gap

TARGETS = ["q_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "LoHaConfig": {"r": 4, "module_dropout": 0.9999999},
    "LoKrConfig": {"r": 4, "rank_dropout": 0.9999999},
    "HiraConfig": {"r": 4, "hira_dropout": 0.9999999},
    "MissConfig": {"r": 4, "miss_dropout": 0.9999999},
    "DeloraConfig": {"r": 4, "module_dropout": 0.9999999},
}


def outputs(model: torch.nn.Module, times: int = 1) -> list[Tensor]:
    return [NETWORKS["llama"].read(model) for _ in range(times)]


def adapted(kind: str, **options: Any) -> veneer.PeftModel:
    config = getattr(veneer, kind)(target_modules=TARGETS, **options)
    model = veneer.get_peft_model(NETWORKS["llama"].make(), config, seed=1)
    scrambled(model, Case("", "llama", kind))
    return model


@pytest.mark.parametrize(("kind", "options"), KINDS.items(), ids=KINDS)
def test_what_is_dropped_is_gone_while_training_only(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = adapted(kind, **options)
    with model.disable_adapter():
        [base] = outputs(model)
    [expected] = outputs(model)
    assert gap(expected, base) > 0.02
    [trained] = outputs(model.train())
    assert gap(trained, base) < 1e-6
    merged = model.merge_and_unload()
    assert gap(outputs(merged)[0], expected) < 1e-5


def test_rows_that_are_kept_are_scaled_up() -> None:
    torch.manual_seed(0)
    model = adapted("LoHaConfig", rank_dropout=0.5)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    [whole], [dropped] = layer.patches(["default"]), layer.train().patches_now(["default"])
    kept = dropped.dense.abs().sum(1) > 0
    assert 0 < kept.sum() < len(kept)
    assert torch.allclose(dropped.dense[kept] * kept.float().mean(), whole.dense[kept])


def test_rows_of_two_factors_are_those_of_the_first() -> None:
    torch.manual_seed(0)
    model = adapted("LoHaConfig", r=1, rank_dropout=0.5)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    [whole], [dropped] = layer.patches(["default"]), layer.train().patches_now(["default"])
    assert whole.dense is None
    kept = dropped.up.abs().sum(1) > 0
    assert 0 < kept.sum() < len(kept)
    assert torch.equal(dropped.down, whole.down)


@pytest.mark.parametrize(("kind", "name"), [("OFTConfig", "module_dropout"), ("BOFTConfig", "boft_dropout")])
def test_blocks_of_a_rotation_are_the_identity(kind: str, name: str) -> None:
    torch.manual_seed(0)
    size = {"OFTConfig": {"oft_block_size": 4}, "BOFTConfig": {}}[kind]
    model = adapted(kind, **size, **{name: 0.5})
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    [whole], [dropped] = layer.patches(["default"]), layer.train().patches_now(["default"])
    still = (dropped.inner.blocks == torch.eye(4)).all(-1).all(-1)
    assert still.sum() == len(still) // 2
    assert torch.equal(dropped.inner.blocks[~still], whole.inner.blocks[~still])
