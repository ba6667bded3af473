"""aLoRA: an adapter that acts only from its invocation tokens on, as peft computes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import veneer
from tests.models import build, gap, logits
from tests.oracle.peer import VISIBLE, config_of, scramble
from tests.random_adapters import bits, same_bits

pytestmark = pytest.mark.oracle

CLOSE = 1e-5
CALL = [50, 51]
OPTIONS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 6,
    "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "v_proj", "down_proj"],
}
# Invoked in the middle, twice, at once, at the end, never, and only half.
IDS = torch.tensor(
    [
        [7, 8, 9, 50, 51, 10, 11, 12],
        [50, 51, 9, 13, 14, 50, 51, 12],
        [50, 51, 9, 13, 14, 15, 16, 12],
        [7, 8, 9, 13, 14, 15, 50, 51],
        [7, 8, 9, 13, 14, 15, 16, 17],
        [7, 8, 9, 13, 14, 51, 50, 17],
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An aLoRA that peft made, and beside it a LoRA in ``plain``."""
    place = tmp_path_factory.mktemp("alora")
    torch.manual_seed(0)  # peft's starting values, whatever ran before
    config = peft.LoraConfig(**OPTIONS, alora_invocation_tokens=CALL)
    scramble(peft.get_peft_model(build("llama"), config)).save_pretrained(place / "alora")
    scramble(peft.get_peft_model(build("llama"), peft.LoraConfig(**OPTIONS)), 5).save_pretrained(place / "plain")
    return place


def pair(folder: Path) -> tuple[veneer.PeftModel, Any]:
    """The same adapters here and in peft, the aLoRA active."""
    ours = veneer.PeftModel.from_pretrained(build("llama"), folder / "alora", adapter_name="alora")
    theirs = peft.PeftModel.from_pretrained(build("llama"), folder / "alora", adapter_name="alora").eval()
    for model in (ours, theirs):
        model.load_adapter(folder / "plain", adapter_name="plain")
    return ours, theirs


def test_it_acts_from_the_last_invocation_on(folder: Path) -> None:
    ours, theirs = pair(folder)
    here, base = logits(ours, {"input_ids": IDS}), logits(build("llama"), {"input_ids": IDS})
    assert gap(here, logits(theirs, {"input_ids": IDS})) < CLOSE
    begins = [3, 5, 0, 6, 8, 8]
    for row, begin in enumerate(begins):
        assert begin == 0 or gap(here[row, :begin], base[row, :begin]) < 1e-6
        assert begin == 8 or gap(here[row, begin:], base[row, begin:]) > VISIBLE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded(folder: Path, side: str) -> None:
    ours, theirs = pair(folder)
    pad = torch.zeros(len(IDS), 3, dtype=torch.int64)
    ids = torch.cat([pad, IDS] if side == "left" else [IDS, pad], 1)
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    assert gap(logits(ours, batch), logits(theirs, batch)) < CLOSE


@pytest.mark.parametrize("options", [{}, {"use_cache": False}])
def test_generation_is_decided_by_the_prompt(folder: Path, options: dict[str, Any]) -> None:
    ours, theirs = pair(folder)
    how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS), **options}
    here = ours.generate(input_ids=IDS, **how)
    # Without a cache peft counts its offset from the end of a text that grows, and forgets the invocation.
    there = theirs.generate(input_ids=IDS, **{**how, "use_cache": True})
    assert torch.equal(here, there)
    assert not torch.equal(here, build("llama").generate(input_ids=IDS, **how))


def test_rows_of_a_batch_with_other_adapters(folder: Path) -> None:
    ours, theirs = pair(folder)
    names = ["alora", "plain", "__base__", "alora", "alora", "plain"]
    here = logits(ours, {"input_ids": IDS}, adapter_names=names)
    assert gap(here, logits(theirs, {"input_ids": IDS}, adapter_names=names)) < CLOSE
    # Beams, which peft refuses.
    two = ours.generate(IDS[:2], adapter_names=["alora", "__base__"], max_new_tokens=5, num_beams=2, do_sample=False)
    alone = ours.generate(IDS[:1], adapter_names=["alora"], max_new_tokens=5, num_beams=2, do_sample=False)
    assert torch.equal(two[0], alone[0])


def test_it_is_never_merged(folder: Path) -> None:
    ours, _ = pair(folder)
    before = bits(ours)
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(veneer.MergeError, match="alora_invocation_tokens"):
            merge()
    ours.set_adapter(["plain", "alora"])
    with pytest.raises(veneer.MergeError):
        ours.merge_adapter()
    assert same_bits(bits(ours), before)
    ours.set_adapter("plain")
    ours.merge_and_unload()


def test_it_is_saved_and_trained(folder: Path, tmp_path: Path) -> None:
    model = veneer.get_peft_model(build("llama"), veneer.LoraConfig(**OPTIONS, alora_invocation_tokens=CALL), seed=1)
    scramble(model).train()
    model(input_ids=IDS[:1], labels=IDS[:1]).loss.backward()
    assert all(bool(p.grad.any()) for p in model.adapters.parameters("default"))
    model.zero_grad()
    model(input_ids=IDS[4:5], labels=IDS[4:5]).loss.backward()
    assert not any(p.grad is not None and bool(p.grad.any()) for p in model.adapters.parameters("default"))
    expected = logits(model.eval(), {"input_ids": IDS})
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["alora_invocation_tokens"] == CALL
    there = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert gap(logits(there, {"input_ids": IDS}), expected) < CLOSE


def test_without_token_ids_it_says_so(folder: Path) -> None:
    ours, _ = pair(folder)
    embedded: Tensor = ours.get_input_embeddings()(IDS)
    with pytest.raises(veneer.AdapterError, match="no token ids"):
        ours(inputs_embeds=embedded)
    with ours.disable_adapter():
        ours(inputs_embeds=embedded)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_without_token_ids_it_does_nothing_in_the_place_of_peft(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(folder)
    embedded: Tensor = ours.get_input_embeddings()(IDS)
    monkeypatch.setattr("veneer.adapters.invocation_hook.stands_in_for_peft", lambda: True)
    with pytest.warns(veneer.VeneerWarning, match="does nothing in this call"):
        here = ours(inputs_embeds=embedded).logits
    assert gap(here, theirs(inputs_embeds=embedded).logits) < CLOSE
    assert gap(here, logits(build("llama"), {"input_ids": IDS})) < CLOSE


def test_taken_off_it_leaves_no_hook(folder: Path) -> None:
    ours, _ = pair(folder)
    base = ours.unload()
    assert not base._forward_hooks
    assert not base._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"use_dora": True}, veneer.ConfigError),
        ({"alora_invocation_tokens": []}, veneer.ConfigError),
        ({"target_modules": ["embed_tokens"]}, veneer.UnsupportedError),
    ],
)
def test_what_it_cannot_be_combined_with(options: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match="alora_invocation_tokens"):
        veneer.get_peft_model(
            build("llama"), veneer.LoraConfig(**{**OPTIONS, "alora_invocation_tokens": CALL, **options})
        )
