from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.files.tensor_keys import Slot, decode, encode

LEAVES = ("lora_A.weight", "lora_B.weight")


@pytest.mark.parametrize(
    ("key", "slot"),
    [
        ("base_model.model.model.layers.0.q_proj.lora_A.weight", Slot("model.layers.0.q_proj", "lora_A.weight")),
        ("base_model.model.score.weight", Slot("score", "weight")),
        ("base_model.model.head.dense.bias", Slot("head.dense", "bias")),
        # Modules whose own names look like parts of a key.
        ("base_model.model.lora_A.weight.lora_B.weight", Slot("lora_A.weight", "lora_B.weight")),
        ("base_model.model.base_model.model.q.lora_A.weight", Slot("base_model.model.q", "lora_A.weight")),
        ("base_model.model.my_lora_A.weight", Slot("my_lora_A", "weight")),
    ],
)
def test_a_key_is_taken_apart_from_its_end(key: str, slot: Slot) -> None:
    assert decode(key, LEAVES) == slot
    assert encode(slot.module, slot.leaf) == key


@pytest.mark.parametrize("key", ["model.layers.0.q_proj.lora_A.weight", "", "lora_A.weight", "base_model.q.weight"])
def test_a_key_of_another_dialect_is_none_of_ours(key: str) -> None:
    assert decode(key, LEAVES) is None


module_names = st.lists(
    st.sampled_from(["model", "layers", "0", "11", "q_proj", "lora_A", "weight", "base_model", "default"]),
    min_size=1,
    max_size=6,
).map(".".join)


@given(module=module_names, leaf=st.sampled_from(LEAVES))
def test_decode_undoes_encode_whatever_the_modules_are_called(module: str, leaf: str) -> None:
    assert decode(encode(module, leaf), LEAVES) == Slot(module, leaf)
