"""LoRA as peft computes and saves it: every option that matters on every architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.models import CASES, gap, inputs, logits
from tests.oracle.peer import WEIGHTS, Peer, base_model, config_of, scramble

pytestmark = pytest.mark.oracle

# Float32 keeps about seven digits; a wrong scale, layer or transposition shows in the first.
CLOSE = 1e-5

# What a config means. The rest of the file records who wrote it, and where.
MEANT = (
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "bias",
    "base_model_name_or_path",
    "inference_mode",
)


def same_meaning(ours: dict[str, object], theirs: dict[str, object]) -> None:
    """Both configs say the same; peft writes a list of targets in no fixed order."""
    assert {key: ours[key] for key in MEANT} == {key: theirs[key] for key in MEANT}
    ours_targets, their_targets = ours["target_modules"], theirs["target_modules"]
    if isinstance(their_targets, list):
        assert sorted(ours_targets) == sorted(their_targets)  # type: ignore[call-overload]
    else:
        assert ours_targets == their_targets


def test_what_peft_saved_computes_the_same_here(peer: Peer) -> None:
    model = veneer.load(peer.folder)
    assert gap(logits(model, inputs(peer.arch)), peer.unmerged) < CLOSE


def test_it_computes_the_same_on_a_base_in_memory(peer: Peer) -> None:
    model = veneer.PeftModel.from_pretrained(base_model(peer.arch, peer.base), peer.folder)
    assert gap(logits(model, inputs(peer.arch)), peer.unmerged) < CLOSE


def test_merged_it_computes_the_same_as_merged_by_peft(peer: Peer) -> None:
    merged = veneer.load(peer.folder).merge_and_unload()
    assert type(merged) is type(base_model(peer.arch, peer.base))
    assert gap(logits(merged, inputs(peer.arch)), peer.merged) < CLOSE


def test_loading_and_saving_changes_no_bit(peer: Peer, tmp_path: Path) -> None:
    veneer.load(peer.folder).save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / WEIGHTS), peer.tensors()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key].view(torch.uint8), tensor.view(torch.uint8)), key
    same_meaning(config_of(tmp_path), config_of(peer.folder))


def test_peft_computes_the_same_from_what_is_saved_here(peer: Peer, tmp_path: Path) -> None:
    veneer.load(peer.folder).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(base_model(peer.arch, peer.base), tmp_path).eval()
    assert gap(logits(model, inputs(peer.arch)), peer.unmerged) < CLOSE


def test_an_adapter_made_here_is_the_one_that_peft_would_make(peer: Peer, tmp_path: Path) -> None:
    case = CASES[peer.arch]
    config = veneer.LoraConfig(task_type=case.task, **case.options, **peer.options)
    model = scramble(veneer.get_peft_model(base_model(peer.arch, peer.base), config))
    model.save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / WEIGHTS), peer.tensors()
    assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in theirs.items()}
    reread = peft.PeftModel.from_pretrained(base_model(peer.arch, peer.base), tmp_path).eval()
    assert gap(logits(model, inputs(peer.arch)), logits(reread, inputs(peer.arch))) < CLOSE


@pytest.mark.parametrize("kind", ["rank_pattern", "alpha_pattern"])
def test_overlapping_patterns_mean_the_same_after_saving(
    kind: str, base_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The first pattern that fits counts, so their order is a part of their meaning: saving must keep it."""
    base = base_folder("gpt2")
    patterns = {kind: {r"h\.1\.attn\.c_attn": 6, "c_attn": 2}}
    config = veneer.LoraConfig(target_modules=["c_attn"], **CASES["gpt2"].options, **patterns)
    model = scramble(veneer.get_peft_model(base_model("gpt2", base), config))
    model.save_pretrained(tmp_path)
    expected = logits(model, inputs("gpt2"))
    here = veneer.PeftModel.from_pretrained(base_model("gpt2", base), tmp_path)
    there = peft.PeftModel.from_pretrained(base_model("gpt2", base), tmp_path).eval()
    assert gap(logits(here, inputs("gpt2")), expected) < CLOSE
    assert gap(logits(there, inputs("gpt2")), expected) < CLOSE
