"""Adaption prompts beyond the contract: generation, packed sequences, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import saved_base
from veneer.errors import BindError, ConfigError, MergeError, TargetError

OPTIONS: dict[str, Any] = {"adapter_len": 3, "adapter_layers": 2, "task_type": "CAUSAL_LM"}


def _saved(folder: Path, arch: str, seed: int = 1) -> Path:
    model = veneer.get_peft_model(build(arch), veneer.AdaptionPromptConfig(**OPTIONS), seed=seed)
    for name, parameter in model.named_parameters():
        if "gate" in name:
            parameter.data.fill_(seed)
    model.save_pretrained(folder)
    return folder


@pytest.mark.oracle
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["cache", "no cache", "beams"])
def test_generation_is_as_in_peft_with_padding(arch: str, options: dict[str, Any], tmp_path: Path) -> None:
    _saved(tmp_path, arch)
    batch = inputs(arch)
    batch["input_ids"][0, :3], batch["attention_mask"][0, :3] = 0, 0
    ours: Any = veneer.PeftModel.from_pretrained(build(arch), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = peft.PeftModel.from_pretrained(build(arch), tmp_path).eval()
        assert gap(logits(ours, batch)[1], logits(theirs, batch)[1]) < 1e-5
        found = [
            model.generate(**batch, **options, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
            for model in (ours, theirs)
        ]
    assert torch.equal(*found)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_parts_of_a_packed_sequence_use_their_own(arch: str, tmp_path: Path) -> None:
    model = veneer.PeftModel.from_pretrained(build(arch), _saved(tmp_path / "a", arch))
    model.load_adapter(_saved(tmp_path / "b", arch, seed=2), adapter_name="other")
    ids = inputs(arch)["input_ids"]
    packed = {"input_ids": ids.reshape(1, -1), "position_ids": torch.arange(7).repeat(2)[None]}
    alone = [
        logits(model, {"input_ids": ids}, adapter_names=[name] * 2)[row]
        for row, name in enumerate(("default", "other"))
    ]
    mixed = logits(model, packed, adapter_names=[("default", 7), ("other", 7)])[0]
    # The second part sees the first, which is as it would be alone.
    assert gap(mixed[:7], alone[0]) < 1e-5
    assert gap(mixed[7:], logits(model, packed, adapter_names=[("default", 14)])[0, 7:]) > 1e-3


def test_what_it_cannot_do_is_refused_with_a_mend(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapter_len"):
        veneer.get_peft_model(build("llama"), veneer.AdaptionPromptConfig(adapter_layers=1))
    with pytest.raises(ConfigError, match="one name"):
        veneer.AdaptionPromptConfig(**OPTIONS, target_modules=["a", "b"])
    with pytest.raises(TargetError, match="known form"):
        veneer.get_peft_model(build("opt"), veneer.AdaptionPromptConfig(**OPTIONS))
    with pytest.raises(TargetError, match="has 2 attention modules"):
        veneer.get_peft_model(build("llama"), veneer.AdaptionPromptConfig(**{**OPTIONS, "adapter_layers": 3}))
    with pytest.raises(BindError):
        veneer.PeftModel.from_pretrained(build("gpt2"), _saved(tmp_path, "llama"))
    model = veneer.PeftModel.from_pretrained(build("llama"), tmp_path)
    with pytest.raises(MergeError, match="decides by the input"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(MergeError, match="decides by the input"):
        veneer.convert_to_lora(model, out=tmp_path / "lora", rank=4)


def test_the_config_is_written_as_peft_has_it(tmp_path: Path) -> None:
    config = peft.PeftConfig.from_pretrained(str(_saved(tmp_path, "llama")))
    assert isinstance(config, peft.AdaptionPromptConfig)
    assert (config.target_modules, config.adapter_len, config.adapter_layers) == ("self_attn", 3, 2)


def test_on_disk_it_is_seen_and_not_merged(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    found = veneer.inspect(_saved(tmp_path / "a", "llama")).adapter
    assert found is not None
    assert found.peft_type == "ADAPTION_PROMPT"
    with pytest.raises(MergeError, match="decides by the input"):
        veneer.merge(tmp_path / "a", base, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
