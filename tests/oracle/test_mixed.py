"""Adapters of several methods active together, as in peft's model for them; and what peft's does not do: save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import veneer
from tests.models import build, gap, inputs, logits
from tests.oracle.peer import VISIBLE, scramble

pytestmark = pytest.mark.oracle

CLOSE = 1e-5
CONFIGS = {
    "first": ("LoraConfig", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    "second": ("LoHaConfig", {"r": 2, "alpha": 2, "target_modules": ["q_proj", "down_proj"]}),
    "third": ("LoKrConfig", {"r": 2, "alpha": 2, "target_modules": ["v_proj", "down_proj"]}),
}


def mixed(library: Any) -> Any:
    """A model with one adapter of each method, all active."""
    configs = {name: getattr(library, kind)(**options) for name, (kind, options) in CONFIGS.items()}
    first, *others = configs
    model = library.get_peft_model(build("llama"), configs[first], first, mixed=True)
    for name in others:
        model.add_adapter(name, configs[name])
    model.set_adapter(list(configs))
    return model


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """Ours and peft's, with the same tensors."""
    theirs, ours = scramble(mixed(peft)), mixed(veneer).eval()
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # peft puts one wrapper around another.
            if set(CONFIGS) & set(name.split(".")):
                own[name.replace(".base_layer", "")].copy_(parameter)
    return ours, theirs


def test_any_selection_is_as_in_peft(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    assert isinstance(ours, veneer.PeftMixedModel)
    seen = []
    for names in (["first", "second", "third"], ["first", "third"], ["second"]):
        for model in pair:
            model.set_adapter(names)
        seen.append(logits(ours, inputs("llama")))
        assert gap(seen[-1], logits(theirs, inputs("llama"))) < CLOSE
        assert all(gap(seen[-1], other) > VISIBLE for other in seen[:-1])


def test_merged_and_deleted_as_in_peft(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    for model in pair:
        model.delete_adapter("second")
        model.set_adapter(["first", "third"])
    expected = logits(theirs, inputs("llama"))
    assert gap(logits(ours, inputs("llama")), expected) < CLOSE
    assert gap(logits(ours.merge_and_unload(), inputs("llama")), expected) < CLOSE


def test_they_are_saved_and_restored_together(pair: tuple[Any, Any], tmp_path: Path) -> None:
    ours, _ = pair
    expected = logits(ours, inputs("llama"))
    ours.save_pretrained(tmp_path)
    again = veneer.load(tmp_path, base=build("llama"))
    assert again.active_adapters == list(CONFIGS)
    assert gap(logits(again, inputs("llama")), expected) < CLOSE
