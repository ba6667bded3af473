"""Merged models some of whose modules shared a weight: the answers stay, in memory, from disk, and saved and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.models import gap
from tests.oracle.peer import VISIBLE, scramble
from tests.sharing import BETWEEN, CLASSES, answers, build

CLOSE = 1e-5
# What is trained -> LoraConfig's options.
TRAINED: dict[str, dict[str, Any]] = {
    "between": {"target_modules": BETWEEN},
    "output saved": {"target_modules": BETWEEN, "modules_to_save": ["lm_head"]},
    "output adapted": {"target_modules": rf"{BETWEEN}|lm_head"},
    "leading one saved": {"target_modules": BETWEEN, "modules_to_save": ["shared"]},
    "one half's saved": {"target_modules": BETWEEN, "modules_to_save": ["decoder.embed_tokens"]},
    "halves' adapted": {"target_modules": rf"{BETWEEN}|.*embed_tokens"},
}
OUTPUTS = [name for name in CLASSES if name not in ("t5 encoder", "t5gemma")]  # its head is a module that holds one
SOME = ["t5", "umt5", "switch", "udop", "bart", "marian", "t5gemma"]
CASES = [
    *((name, "between") for name in CLASSES),
    *((name, "output adapted") for name in OUTPUTS),
    *((name, case) for name in SOME for case in TRAINED if case not in ("between", "output adapted")),
]


@pytest.mark.parametrize(("name", "case"), [case for case in CASES if case != ("t5gemma", "leading one saved")])
def test_merged_it_answers_the_same_wherever_it_is_read(name: str, case: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "base")
    model = scramble(veneer.get_peft_model(build(name), veneer.LoraConfig(r=4, **TRAINED[case]), seed=1))
    expected, before = answers(name, model), build(name)
    unheard = case == "leading one saved" and name != "marian"  # the halves read with their own
    assert unheard or gap(expected, answers(name, before)) > VISIBLE / 10
    model.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    merged: Any = model.merge_and_unload()  # type: ignore[operator]
    assert gap(answers(name, merged), expected) < CLOSE
    merged.save_pretrained(tmp_path / "memory")
    veneer.merge(tmp_path / "adapter", tmp_path / "base", out=tmp_path / "disk")
    for folder in ("memory", "disk"):
        again, info = type(before).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert gap(answers(name, again.eval()), expected) < CLOSE
        assert not info["missing_keys"]
        assert again.config.tie_word_embeddings == merged.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["bart", "t5gemma"])
def test_the_config_says_so_only_where_weights_differ(name: str) -> None:
    for case, ties in (("between", True), ("output saved", False)):
        model: Any = scramble(veneer.get_peft_model(build(name), veneer.LoraConfig(r=4, **TRAINED[case]), seed=1))
        assert model.merge_and_unload().config.tie_word_embeddings is ties


def test_what_is_changed_alike_is_one_weight_again() -> None:
    config = veneer.LoraConfig(target_modules=BETWEEN, trainable_token_indices=[5])
    merged = scramble(veneer.get_peft_model(build("bart"), config)).merge_and_unload()  # type: ignore[operator]
    halves = (merged.model.shared, merged.model.encoder.embed_tokens, merged.model.decoder.embed_tokens)
    assert all(half.weight is merged.lm_head.weight for half in halves)
