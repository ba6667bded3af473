"""What a training step keeps in memory, in exact bytes. The peer is the oracle for the peak."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import veneer

pytestmark = pytest.mark.oracle

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LORA_CASES = (
    "LoRA",
    "LoRA, dropout",
    "LoRA, autocast",
    "LoRA, autocast, dropout",
    "LoRA, bfloat16 adapter",
    "LoRA, bfloat16 adapter, dropout",
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("saved_bytes")


@pytest.mark.parametrize("label", LORA_CASES)
def test_a_lora_keeps_its_layers_inputs_alone(bench: Any, label: str) -> None:
    # q, k and v share one input, and so do gate and up; attention keeps the input of o itself.
    expected = 2 * (2 * bench.HIDDEN + bench.INTERMEDIATE)
    kept = bench.own(bench.CASES[label], veneer)
    assert kept.saved == expected
    assert kept.alive == expected, "something is kept beside what autograd packs"


def test_dora_keeps_its_outputs_too(bench: Any) -> None:
    kept = bench.own(bench.CASES["DoRA"], veneer)
    # The outputs of v, gate and up are kept anyway.
    inputs, outputs = 2 * bench.HIDDEN + bench.INTERMEDIATE, 3 * bench.HIDDEN + bench.KEYS
    assert kept.saved == kept.alive == 2 * (inputs + outputs)
    assert kept.saved <= 2200


def test_ia3_keeps_no_float32_copies(bench: Any) -> None:
    kept = bench.own(bench.CASES["IA3"], veneer)
    # The outputs of q, k, v, o, gate and up, and the input of down.
    assert kept.saved == kept.alive == 2 * (2 * bench.HIDDEN + 2 * bench.KEYS + 3 * bench.INTERMEDIATE) == 2880


def test_vera_keeps_its_layers_inputs_alone(bench: Any) -> None:
    kept = bench.own(bench.CASES["VeRA"], veneer)
    assert kept.saved == kept.alive == 2 * bench.HIDDEN


def test_a_frozen_a_keeps_the_products_alone(bench: Any) -> None:
    model = bench.adapted(veneer, bench.CASES["LoRA"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    assert bench.measure(model).saved - bench.measure(bench.base()).saved == 4 * bench.RANK * len(bench.TARGETS)


@pytest.mark.parametrize("label", ["LoRA, checkpointing", "LoRA, checkpointing, dropout"])
def test_the_peak_of_a_step_with_checkpointing_is_far_below_the_peers(bench: Any, label: str) -> None:
    ours, theirs = (bench.own(bench.CASES[label], library) for library in (veneer, peft))
    assert ours.saved == theirs.saved, "the inputs of the blocks"
    assert ours.peak <= 0.7 * theirs.peak


def test_hooks_see_every_tensor_that_is_kept(bench: Any) -> None:
    """As for torch's own layers: what moves saved tensors to another device finds the weight among them."""
    model = bench.adapted(veneer, bench.CASES["LoRA, dropout"])
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    x = torch.randn(3, bench.INTERMEDIATE, dtype=torch.bfloat16, requires_grad=True)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: packed.append(tensor) or len(packed) - 1, packed.__getitem__
    ):
        layer(x).sum().backward()
    expected = {
        x.data_ptr(),
        layer.base_layer.weight.data_ptr(),
        *(p.data_ptr() for p in layer.parameters() if p.requires_grad),
    }
    assert expected == {tensor.data_ptr() for tensor in packed}
