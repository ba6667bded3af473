"""Merging in memory, a layer on each core."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.random_adapters import adapted, bits, same_bits
from veneer.errors import MergeError
from veneer.layers.adapted_layer import AdaptedLayer


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_at_a_time_give_the_bits_of_one_after_the_other(dtype: torch.dtype) -> None:
    model = adapted("qwen2", target_modules="all-linear", bias="all").to(dtype)
    plain = bits(model)
    for layer in model.adapters.layers.values():
        layer.merge_adapters(("default",))
    expected = bits(model)
    for layer in model.adapters.layers.values():
        layer.unmerge()
    model.merge_adapter()
    assert same_bits(bits(model), expected)
    assert not same_bits(expected, plain)
    model.unmerge_adapter()
    assert same_bits(bits(model), plain)
    assert torch.get_num_threads() == 2
    merged = model.merge_and_unload()
    wanted = {key.replace(".base_layer", ""): tensor for key, tensor in expected.items() if "lora_" not in key}
    assert all(torch.equal(tensor, wanted[f"base_model.model.{key}"]) for key, tensor in bits(merged).items())


def test_an_error_of_one_layer_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    last = list(model.adapters.layers.values())[-1]
    merge = AdaptedLayer.merge_adapters

    def failing(layer: AdaptedLayer, names: tuple[str, ...]) -> None:
        if layer is last:
            raise MergeError("no", hint="none")
        merge(layer, names)

    monkeypatch.setattr(AdaptedLayer, "merge_adapters", failing)
    with pytest.raises(MergeError, match="no"):
        model.merge_adapter()
    assert torch.get_num_threads() == 2
