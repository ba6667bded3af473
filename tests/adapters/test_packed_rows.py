"""Several sequences packed into one row, each under its own adapter, as continuous batching computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from tests.models import build, gap
from tests.random_adapters import enlarge
from veneer.errors import AdapterError
from veneer.patches import row_order, selection

PARTS = [("a", 3), ("__base__", 2), ("b", 4), ("a", 1), ("b", 1)]
IDS = torch.randint(3, 99, (sum(tokens for _, tokens in PARTS),), generator=torch.Generator().manual_seed(4))
CLOSE = 1e-5
WHERE = {
    "a head's LoRA": {"target_modules": ["q_proj", "lm_head"]},
    "a head alone": {"target_modules": ["lm_head"]},
    "a head brought whole": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "an embedding": {"target_modules": ["embed_tokens", "down_proj"]},
}


def packed(**more: Any) -> dict[str, Any]:
    """The call for all parts, whose mask and positions keep them apart."""
    apart = torch.block_diag(*[torch.ones(tokens, tokens) for _, tokens in PARTS]).tril().bool()
    positions = torch.cat([torch.arange(tokens) for _, tokens in PARTS])
    return {"input_ids": IDS[None], "position_ids": positions[None], "attention_mask": apart[None, None], **more}


@pytest.fixture(scope="module", params=WHERE.values(), ids=WHERE)
def model(request: pytest.FixtureRequest) -> veneer.PeftModel:
    own = veneer.PeftModel(build("llama"))
    for rank, name in ((2, "a"), (3, "b")):
        own.add_adapter(name, veneer.LoraConfig(r=rank, **request.param))
        enlarge(own, name, rank)
        own.set_requires_grad(name, False)
    return own.eval()


@pytest.fixture(scope="module")
@torch.no_grad()
def expected(model: veneer.PeftModel) -> Tensor:
    """The logits of each part alone, one after the other."""
    logits, start = [], 0
    for name, tokens in PARTS:
        with model.disable_adapter() if name == "__base__" else model.using(name):
            logits.append(model(IDS[None, start : start + tokens]).logits[0])
        start += tokens
    return torch.cat(logits)


KEPT = {
    "all": 0,
    "the last": 1,
    "several": 5,
    "each part's last": torch.tensor([2, 4, 8, 9, 10]),
    "some, twice, in another order": torch.tensor([8, 0, 8, 3]),
    "as many as there are, in another order": torch.arange(11).flip(0),
    "counted from the end": torch.tensor([-1, -11]),
}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@torch.no_grad()
def test_the_head_sees_the_kept_tokens(model: veneer.PeftModel, expected: Tensor, kept: int | Tensor) -> None:
    logits = model(**packed(logits_to_keep=kept), adapter_names=PARTS).logits[0]
    assert gap(logits, expected[-kept:] if isinstance(kept, int) else expected[kept]) < CLOSE


@torch.no_grad()
def test_all_tokens(model: veneer.PeftModel, expected: Tensor) -> None:
    assert gap(model(**packed(), adapter_names=PARTS).logits[0], expected) < CLOSE
    tokens = [(name, 1) for name, tokens in PARTS for _ in range(tokens)]
    assert gap(model(**packed(), adapter_names=tokens).logits[0], expected) < CLOSE


def test_other_counts_are_refused(model: veneer.PeftModel) -> None:
    with pytest.raises(AdapterError, match="12 tokens, and the batch 11 tokens"):
        model(**packed(), adapter_names=[*PARTS, ("a", 1)])
    with pytest.raises(AdapterError, match="12 tokens, and the batch 11 tokens"):
        model(**packed(logits_to_keep=1), adapter_names=[*PARTS, ("a", 1)])


@torch.no_grad()
def test_a_long_part_is_not_taken_token_by_token(model: veneer.PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    original = row_order.numbers

    def noted(spans: Sequence[range]) -> Tensor:
        counts.append(len(spans))
        return original(spans)

    monkeypatch.setattr(row_order, "numbers", noted)
    monkeypatch.setattr(selection, "numbers", noted)
    ids = torch.randint(3, 99, (1, 300), generator=torch.Generator().manual_seed(5))
    found = model(ids, adapter_names=[("a", 200), ("b", 100)]).logits[0]
    with model.using("a"):
        assert gap(found[:200], model(ids).logits[0, :200]) < CLOSE
    assert counts
    assert max(counts) <= 2
