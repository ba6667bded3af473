"""Which adapters a server takes as they are, and the mend of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.models import build
from tests.random_adapters import edit_config, edit_tensors, saved, saved_base
from veneer.errors import UsageError

TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}


def folder(config: Any, path: Path) -> Path:
    veneer.get_peft_model(build("llama"), config, seed=1).save_pretrained(path)
    return path


@pytest.mark.parametrize(("rank", "limit"), [(1, 1), (3, 8), (8, 8), (9, 16), (32, 32)])
def test_a_plain_lora_is_taken_with_the_limit_of_ranks_to_ask_for(rank: int, limit: int, tmp_path: Path) -> None:
    report = veneer.check_serving(folder(veneer.LoraConfig(r=rank, use_rslora=True, **TARGETS), tmp_path / "a"))
    assert (report.fits, report.max_lora_rank, report.problems) == (True, limit, ())


@pytest.mark.parametrize(
    ("config", "code", "command"),
    [
        (veneer.IA3Config(feedforward_modules=["down_proj"], **TARGETS), "method", "convert"),
        (veneer.LoraConfig(use_dora=True, **TARGETS), "dora", "convert"),
        (veneer.LoraConfig(bias="lora_only", target_modules=["q_proj"]), "bias", "merge"),
        (veneer.LoraConfig(lora_bias=True, **TARGETS), "lora_bias", "merge"),
        (veneer.LoraConfig(modules_to_save=["lm_head"], **TARGETS), "modules_to_save", "merge"),
        (veneer.LoraConfig(rank_pattern={"q_proj": 2}, **TARGETS), "rank_pattern", "convert"),
        (veneer.LoraConfig(alpha_pattern={"q_proj": 2}, **TARGETS), "alpha_pattern", "convert"),
        (veneer.LoraConfig(kasa_config=veneer.KasaConfig(), **TARGETS), "kasa_config", "convert"),
        (veneer.LoraConfig(alora_invocation_tokens=[3], **TARGETS), "alora_invocation_tokens", "merge"),
        (veneer.LoraConfig(trainable_token_indices=[1], **TARGETS), "tensors", "merge"),
        (veneer.LoraConfig(r=520, **TARGETS), "rank", "convert"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused_or_ignored_has_its_mend(config: Any, code: str, command: str, tmp_path: Path) -> None:
    report = veneer.check_serving(folder(config, tmp_path / "a"))
    assert not report.fits
    assert [problem.code for problem in report.problems] == [code]
    assert f"veneer {command} {tmp_path / 'a'}" in report.problems[0].hint


def test_converted_as_the_hint_says_it_is_taken(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    for name, options in (("patterns", {"rank_pattern": {"q_proj": 2}}), ("dora", {"use_dora": True})):
        adapter = folder(veneer.LoraConfig(init_lora_weights=False, **options, **TARGETS), tmp_path / name)
        rank = 16 if name == "dora" else None
        veneer.convert_to_lora(adapter, out=tmp_path / f"{name}-lora", rank=rank, base=base)
        assert veneer.check_serving(tmp_path / f"{name}-lora").fits


def test_a_start_that_loading_computes_is_not_served(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    config = veneer.LoraConfig(init_lora_weights="pissa", r=4, **TARGETS)
    veneer.get_peft_model(build("llama"), config).save_pretrained(tmp_path / "own", convert_start=False)
    (problem,) = veneer.check_serving(tmp_path / "own").problems
    assert problem.code == "start"
    assert f"veneer convert {tmp_path / 'own'}" in problem.hint
    report = veneer.convert_to_lora(tmp_path / "own", out=tmp_path / "plain", base=base)
    assert report.rank == 8
    assert veneer.check_serving(tmp_path / "plain").fits


def test_keys_that_others_write_are_told(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "a")
    edit_tensors(adapter, lambda tensors: {key.replace(".weight", ".x.weight"): t for key, t in tensors.items()})
    assert [problem.code for problem in veneer.check_serving(adapter).problems] == ["keys"]


def test_a_missing_key_and_an_unknown_server(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "a")
    edit_config(adapter, lora_alpha=...)
    assert [problem.code for problem in veneer.check_serving(adapter).problems] == ["missing"]
    with pytest.raises(UsageError, match="no server"):
        veneer.check_serving(adapter, "tgi")
