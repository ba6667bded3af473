"""Folded and stacked forms: several adapters in one batch, of different ranks and methods, by row and by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from tests.models import gap, logits, tokens
from tests.random_adapters import adapted, config, enlarge
from veneer.errors import AdapterError, UnsupportedError
from veneer.layers.adapted_layer import AdaptedLayer

TARGETS = ["q_proj", "v_proj", "down_proj"]
OTHERS: dict[str, Any] = {
    "wide": veneer.LoraConfig(r=9, target_modules=TARGETS, init_lora_weights=False),
    "dora": veneer.LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "shifts": veneer.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, lora_bias=True),
    "scales": veneer.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], init_ia3_weights=False),
    "dense": veneer.LoHaConfig(r=8, target_modules=["v_proj"]),
    "elsewhere": veneer.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False),
}
NAMES = ["default", *OTHERS, "__base__"]


def several(arch: str = "qwen2") -> veneer.PeftModel:
    """A model (with biases) and an adapter of every kind on it."""
    model = adapted(arch, target_modules=TARGETS)
    for seed, (name, other) in enumerate(OTHERS.items()):
        model.add_adapter(name, other, seed=seed)
        enlarge(model, name, seed)
    for name in NAMES[:-1]:
        model.set_requires_grad(name, False)
    return model.eval()


def alone(model: veneer.PeftModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each adapter's logits for the whole batch."""
    found = {}
    for name in NAMES[:-1]:
        with model.using(name):
            found[name] = logits(model, batch)
    with model.disable_adapter():
        found["__base__"] = logits(model, batch)
    return found


@pytest.fixture(scope="module")
def model() -> veneer.PeftModel:
    return several()


ROWS = [
    NAMES,
    ["wide", "__base__", "wide", "default", "__base__", "scales", "scales", "dora"],
    ["default", *["shifts"] * 7],
    ["dense", "__base__"] * 4,
    ["elsewhere"] * 8,
    ["__base__"] * 8,
]


@pytest.mark.parametrize("rows", ROWS, ids=["all", "unordered", "uneven", "dense", "elsewhere", "base"])
@pytest.mark.parametrize("length", [1, 5])
def test_each_row_is_as_under_its_adapter_alone(model: veneer.PeftModel, rows: list[str], length: int) -> None:
    batch = tokens(8, length)
    expected = alone(model, batch)
    mixed = logits(model, batch, adapter_names=rows)
    for index, name in enumerate(rows):
        assert gap(mixed[index], expected[name][index]) < 1e-5, name
        if name != "__base__":
            assert gap(mixed[index], expected["__base__"][index]) > 1e-3, name


def test_rows_of_the_base_keep_every_bit(model: veneer.PeftModel) -> None:
    batch = tokens(8, 3)
    mixed = logits(model, batch, adapter_names=["default", "__base__"] * 4)
    with model.disable_adapter():
        assert torch.equal(mixed[1::2], logits(model, batch)[1::2])


def test_a_later_batch_of_other_adapters_is_its_own(model: veneer.PeftModel) -> None:
    batch = tokens(2, 3)
    expected = alone(model, batch)
    for rows in (["default", "wide"], ["wide", "default"], ["wide", "dora"], ["default", "wide"]):
        mixed = logits(model, batch, adapter_names=rows)
        for index, name in enumerate(rows):
            assert gap(mixed[index], expected[name][index]) < 1e-5


@pytest.mark.parametrize("change", ["in place", "removed", "merged", "moved"])
def test_what_is_kept_follows_the_adapters(change: str) -> None:
    model, batch, rows = several("llama"), tokens(2, 3), ["default", "wide"]
    before = logits(model, batch, adapter_names=rows)
    if change == "in place":
        enlarge(model, "wide", 77)
    elif change == "removed":
        model.delete_adapter("wide")
        model.add_adapter("wide", config(target_modules=TARGETS, r=5), seed=5)
        enlarge(model, "wide", 78)
    elif change == "merged":
        model.merge_adapter(["wide"])
    else:
        model.to(torch.float64)
    after = logits(model, batch, adapter_names=rows)
    with model.using("wide"):
        assert gap(after[1], logits(model, batch)[1]) < 1e-5
    assert gap(after[0], before[0]) < 1e-5
    assert (gap(after[1], before[1]) < 1e-5) == (change in ("merged", "moved"))


def test_gradients_reach_the_adapters_of_their_rows() -> None:
    model = several("llama")
    model.set_requires_grad("default")
    model.set_adapter("default")
    model(**tokens(2, 3), adapter_names=["wide", "default"]).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.adapters.parameters("default"))
    assert all(p.grad is None for p in model.adapters.parameters("wide"))


def test_tokens_of_a_packed_sequence_have_their_own_adapters(model: veneer.PeftModel) -> None:
    parts = [("wide", 2), ("__base__", 1), ("default", 3), ("scales", 1), ("dense", 1)]
    layer: Any = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with model.adapters.using(model.adapters.rows(parts)):
            packed = layer(x)
        start = 0
        for name, length in parts:
            chosen = model.disable_adapter() if name == "__base__" else model.using(name)
            with chosen:
                own = layer(x)
            assert gap(packed[:, start : start + length], own[:, start : start + length]) < 1e-5, name
            start += length


def test_packed_sequences_are_as_apart() -> None:
    model, batch = several("llama"), tokens(2, 4)
    ids = batch["input_ids"]
    expected = logits(model, batch, adapter_names=["default", "wide"])
    apart = torch.block_diag(*[torch.ones(4, 4)] * 2).tril().bool()[None, None]
    mask = torch.zeros(1, 1, 8, 8).masked_fill(~apart, torch.finfo(torch.float32).min)
    packed = {
        "input_ids": ids.reshape(1, 8),
        "attention_mask": mask,
        "position_ids": torch.arange(4).repeat(2)[None],
    }
    found = logits(model, packed, adapter_names=[("default", 4), ("wide", 4)])
    assert gap(found.view(2, 4, -1), expected) < 1e-5


def test_names_that_do_not_fit_the_batch_are_refused(model: veneer.PeftModel) -> None:
    with pytest.raises(AdapterError, match="3 names, and the batch 4 rows"):
        logits(model, tokens(4, 3), adapter_names=["default"] * 3)
    with pytest.raises(AdapterError, match="3 tokens, and the batch 4 tokens"):
        logits(model, tokens(1, 4), adapter_names=[("default", 2), ("wide", 1)])
    with pytest.raises(AdapterError, match="parts of a packed sequence"):
        logits(model, tokens(1, 4), adapter_names=["default", ("wide", 1)])


def test_invocation_tokens_are_refused_in_a_packed_sequence() -> None:
    model = adapted("llama", alora_invocation_tokens=[5, 6])
    with pytest.raises(UnsupportedError, match="acts by whole sequences"):
        logits(model, tokens(1, 4), adapter_names=[("default", 4)])


def test_attention_has_one_adapter_for_a_sequence() -> None:
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    base = torch.nn.Sequential()
    base.add_module("attention", attention)
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False))
    x = torch.randn(1, 4, 8)
    tokens_apart = model.adapters.using(model.adapters.rows([("default", 4)]))
    with tokens_apart, pytest.raises(UnsupportedError, match="one adapter for each token"):
        base.attention(x, x, x)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_that_is_changed_in_place_is_read_again(dtype: torch.dtype, length: int, mode: Any) -> None:
    model = several("llama").to(dtype)
    block: Any = model.get_base_model().model.layers[0].self_attn
    with mode():
        x = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
        first = block.q_proj(x)
        expected, changed = block.v_proj(x), block.v_proj(x + 1)
        assert gap(changed, expected) > 0.1
        assert torch.equal(block.q_proj(x), first)
        x += 1
        assert torch.equal(block.v_proj(x), changed)


@pytest.mark.parametrize("length", [1, 5])
def test_half_precision_is_as_near_to_float32_as_the_plain_path(length: int) -> None:
    exact, half = several("llama"), several("llama").to(torch.bfloat16)
    x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    layers: list[Any] = [m.get_base_model().model.layers[0].self_attn.q_proj for m in (exact, half)]
    with torch.no_grad():
        folded = layers[1](x)
        expected = layers[0](x.float())
    plain = layers[1](x.requires_grad_())  # a gradient is wanted, so nothing is folded
    assert folded.dtype is torch.bfloat16
    assert gap(folded.float(), expected) < 1.5 * gap(plain.detach().float(), expected) + 1e-3


@pytest.mark.parametrize(("method", "kept"), [("turns", True), ("norms", True), ("dense", False)])
def test_small_patches_are_lowered_once_and_large_ones_take_no_memory(
    method: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = several("llama"), tokens(1, 3)
    model.add_adapter("turns", veneer.OFTConfig(oft_block_size=4, target_modules=["v_proj"]), seed=1)
    model.add_adapter("norms", veneer.LNTuningConfig(target_modules=["input_layernorm"]), seed=1)
    for name in ("turns", "norms"):
        enlarge(model, name, 1)
        model.set_requires_grad(name, False)
    model.set_adapter(method, inference_mode=True)
    lowered: list[str] = []
    plain = AdaptedLayer.patches

    def patches(self: AdaptedLayer, names: Any) -> Any:
        lowered.append(self.site.name)
        return plain(self, names)

    monkeypatch.setattr(AdaptedLayer, "patches", patches)
    first = logits(model, batch)
    lowered.clear()
    assert torch.equal(logits(model, batch), first)
    assert bool(lowered) != kept
    enlarge(model, method, 9)
    model.set_requires_grad(method, False)
    changed = logits(model, batch)
    assert gap(changed, first) > 1e-3
    assert gap(logits(model.merge_and_unload(), batch), changed) < 1e-5
