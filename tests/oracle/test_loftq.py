"""LoftQ by its definition (peft's own wants a GPU), its quantisers beside those of bitsandbytes; MiCA beside peft's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.large.quantized import library, quantized
from tests.models import WIDE_LLAMA, build, gap, inputs, logits
from tests.oracle.peer import VISIBLE, config_of, scramble
from tests.random_adapters import bits, edit_config, same_bits
from veneer.methods.lora_starts import loftq

pytestmark = pytest.mark.oracle

CLOSE = 1e-5
LINEAR = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
BATCH = inputs(WIDE_LLAMA)
FORM = "bitsandbytes 4 bits"
OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True, "rank_pattern": {"q_proj": 6}},
    {"loftq_config": veneer.LoftQConfig(loftq_iter=4)},
    {"loftq_config": {"loftq_bits": 8}},
]


@pytest.fixture(autouse=True)
def portable_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout that depends on the processor wants larger layers than these."""
    monkeypatch.setattr(library("bitsandbytes.nn.modules"), "has_avx512bf16", lambda: False)


def begun(how: str = "loftq", base: nn.Module | None = None, **options: Any) -> veneer.PeftModel:
    config = veneer.LoraConfig(init_lora_weights=how, **{**LINEAR, **options})
    return veneer.get_peft_model(base or build(WIDE_LLAMA), config, seed=2).eval()


def on_quantised(model: veneer.PeftModel) -> nn.Module:
    """The base with the quantised weights in place."""
    base = build(WIDE_LLAMA)
    config: Any = model.peft_config["default"]
    for layer in model.adapters.layers.values():
        weight = base.get_submodule(layer.site.name).weight
        r = config.rank_pattern.get("q_proj", 4) if "q_proj" in layer.site.name else 4
        weight.data = loftq.quantised(weight.data, r, config.loftq_config)
    return base


def errors(model: veneer.PeftModel) -> dict[str, tuple[float, float]]:
    """Layer -> how far the original weight is from the quantised one, and from it with the adapter."""
    found = {}
    plain, rounded = build(WIDE_LLAMA), on_quantised(model)
    merged = model.merge_and_unload()
    for name in [name for name, m in plain.named_modules() if name.endswith(("q_proj", "down_proj"))]:
        weight, near, nearer = (m.get_submodule(name).weight.detach() for m in (plain, rounded, merged))
        found[name] = float((weight - near).norm()), float((weight - nearer).norm())
    return found


@pytest.mark.parametrize("shape", [(64, 128), (10, 24)])
def test_the_quantisers_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    functional = library("bitsandbytes.functional")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert gap(loftq.quantised(weight, 4, {}), functional.dequantize_4bit(packed, state)) < CLOSE
    whole, scales, _ = functional.int8_vectorwise_quant(weight.half())
    assert gap(loftq.quantised(weight, 4, {"loftq_bits": 8}), functional.int8_vectorwise_dequant(whole, scales)) < 1e-2


@pytest.mark.parametrize("options", OPTIONS)
def test_with_the_adapter_the_quantised_weights_are_nearer(options: dict[str, Any]) -> None:
    for plain, with_adapter in errors(begun(**options)).values():
        assert with_adapter < 0.95 * plain


def test_taking_turns_comes_nearer_still() -> None:
    once, often = errors(begun()), errors(begun(loftq_config={"loftq_iter": 5}))
    assert sum(error for _, error in often.values()) < 0.98 * sum(error for _, error in once.values())


@pytest.mark.parametrize("options", OPTIONS)
def test_it_acts_on_the_quantised_base_and_leaves_the_own_alone(options: dict[str, Any], tmp_path: Path) -> None:
    base = build(WIDE_LLAMA)
    before, plain = bits(base), logits(base, BATCH)
    model = scramble(begun(base=base, **options))
    expected = logits(model, BATCH)
    assert gap(expected, plain) > VISIBLE
    with model.disable_adapter():
        assert gap(logits(model, BATCH), plain) < 1e-7
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["init_lora_weights"] == "loftq"
    assert config_of(tmp_path)["r"] == 4
    assert config_of(tmp_path)["loftq_config"].keys() == {"loftq_bits", "loftq_iter"} or "loftq_config" in options
    again = veneer.PeftModel.from_pretrained(build(WIDE_LLAMA), tmp_path)
    assert gap(logits(again, BATCH), expected) < CLOSE
    assert gap(logits(again.merge_and_unload(), BATCH), expected) < CLOSE
    rounded = on_quantised(model)
    assert gap(logits(veneer.PeftModel.from_pretrained(rounded, tmp_path), BATCH), expected) < CLOSE
    edit_config(tmp_path, init_lora_weights=True, loftq_config={})
    for kind in (veneer.PeftModel, peft.PeftModel):
        assert gap(logits(kind.from_pretrained(on_quantised(model), tmp_path).eval(), BATCH), expected) < CLOSE
    assert same_bits(bits(model.unload()), before)


def test_on_disk_it_merges_to_the_same(tmp_path: Path) -> None:
    build(WIDE_LLAMA).save_pretrained(tmp_path / "base")
    model = scramble(begun())
    model.save_pretrained(tmp_path / "adapter")
    veneer.merge(tmp_path / "adapter", tmp_path / "base", out=tmp_path / "out")
    assert gap(logits(veneer.load(tmp_path / "out"), BATCH), logits(model, BATCH)) < CLOSE


def test_only_the_adapter_learns_under_dropout_too() -> None:
    model = begun(lora_dropout=0.5)
    expected = logits(model, BATCH)
    model.train()
    for parameter in model.adapters.parameters("default"):
        parameter.data.zero_()
    # Dropout is the LoRA's affair: the quantised weight itself is not dropped.
    assert gap(logits(model, BATCH), logits(on_quantised(model).train(), BATCH)) < CLOSE
    assert gap(expected, logits(model, BATCH)) > 1e-4
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in model.named_parameters() if "lora_A" in name or "lora_B" in name}


def test_two_of_them_are_not_active_together() -> None:
    model = begun()
    model.add_adapter("other", veneer.LoraConfig(init_lora_weights="loftq", **LINEAR))
    model.set_adapter("other")
    with pytest.raises(veneer.AdapterError, match="LoftQ"):
        model.set_adapter(["default", "other"])
    assert logits(model, BATCH, adapter_names=["default", "other"]).isfinite().all()


# -- bases that are packed ---------------------------------------------------------------------------------


def packed() -> tuple[veneer.PeftModel, list[str]]:
    model = begun(how=True, base=quantized(FORM))
    return model, list(model.adapters.layers)


def distances(model: veneer.PeftModel) -> list[float]:
    plain = build(WIDE_LLAMA)
    merged = model.merge_and_unload(into="dequantized")
    names = [name for name, _ in plain.named_modules() if name.endswith(("q_proj", "down_proj"))]
    return [float((plain.get_submodule(n).weight - merged.get_submodule(n).weight).detach().norm()) for n in names]


def test_a_packed_base_is_made_up_for(tmp_path: Path) -> None:
    build(WIDE_LLAMA).save_pretrained(tmp_path / "base")
    before, _ = packed()
    model, layers = packed()
    asked: list[str] = []

    def keep(own: veneer.PeftModel, name: str) -> bool:
        asked.append(name)
        return name != layers[0]

    veneer.replace_lora_weights_loftq(model, tmp_path / "base", callback=keep)
    assert asked == layers
    model.save_pretrained(tmp_path / "adapter")
    again = veneer.PeftModel.from_pretrained(quantized(FORM), tmp_path / "adapter")
    assert torch.equal(logits(again, BATCH), logits(model, BATCH))
    first, *rest = zip(distances(model), distances(before), strict=True)
    assert first[0] == first[1]
    assert all(now < 0.95 * then for now, then in rest)


def test_begun_on_the_plain_base_it_runs_on_the_packed_one(tmp_path: Path) -> None:
    """What is packed once is what LoftQ with one turn began on."""
    model = scramble(begun(target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    on_packed = veneer.PeftModel.from_pretrained(quantized(FORM), tmp_path)
    assert gap(logits(on_packed, BATCH), logits(model, BATCH)) < 1e-4


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(veneer.UnsupportedError, match="replace_lora_weights_loftq"):
        begun(base=quantized(FORM))
    with pytest.raises(veneer.AdapterError, match="no LoRA on a packed"):
        veneer.replace_lora_weights_loftq(begun(how=True), tmp_path)
    quantised, _ = packed()
    with pytest.raises(veneer.SourceError, match="where it is from"):
        veneer.replace_lora_weights_loftq(quantised)
    build("gpt2").save_pretrained(tmp_path)
    with pytest.raises(veneer.BaseModelError, match="in floating point"):
        veneer.replace_lora_weights_loftq(quantised, tmp_path)


# -- MiCA --------------------------------------------------------------------------------------------------


def tensors_of(model: Any, leaf: str) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if leaf in name}


def test_mica_begins_and_trains_as_in_peft(tmp_path: Path) -> None:
    mine = begun("mica")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.get_peft_model(build(WIDE_LLAMA), peft.LoraConfig(init_lora_weights="mica", **LINEAR))
    for name, up in tensors_of(other, "lora_B").items():
        assert gap(tensors_of(mine, "lora_B")[name].abs(), up.abs()) < 1e-3
    wanted = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (mine, other)]
    assert wanted[0] == wanted[1] == set(tensors_of(mine, "lora_A"))
    assert gap(logits(mine, BATCH), logits(build(WIDE_LLAMA), BATCH)) < CLOSE
    expected = logits(scramble(mine), BATCH)
    assert gap(expected, logits(build(WIDE_LLAMA), BATCH)) > 1e-3
    mine.save_pretrained(tmp_path)
    assert gap(logits(peft.PeftModel.from_pretrained(build(WIDE_LLAMA), tmp_path).eval(), BATCH), expected) < CLOSE
    here = veneer.PeftModel.from_pretrained(build(WIDE_LLAMA), tmp_path, is_trainable=True)
    assert gap(logits(here.eval(), BATCH), expected) < CLOSE
    assert {n for n, p in here.named_parameters() if p.requires_grad} == set(tensors_of(mine, "lora_A"))
