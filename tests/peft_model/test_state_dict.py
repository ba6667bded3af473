"""The tensors of one adapter as a dictionary: read, set, and read from a folder."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import adapted, saved, saved_base
from veneer.errors import (
    AdapterError,
    BaseModelError,
    BindError,
    MergeError,
    NonFiniteError,
    UnknownAdapterError,
    UnknownKeywordError,
    UnsupportedError,
)

OPTIONS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def both() -> tuple[Any, Any]:
    """The same new adapter here and in peft."""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(**OPTIONS))
    ours = veneer.get_peft_model(build("llama"), veneer.LoraConfig(**OPTIONS))
    return ours, theirs


@pytest.mark.oracle
def test_what_peft_gives_is_set_here_and_the_other_way_round() -> None:
    ours, theirs = both()
    result = veneer.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    assert result.missing_keys == result.unexpected_keys == []
    state, expected = veneer.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    assert not peft.set_peft_model_state_dict(theirs, state).unexpected_keys


@pytest.mark.oracle
@pytest.mark.parametrize("ignore", [False, True])
def test_keys_that_are_missing_or_unexpected_are_those_of_peft(ignore: bool) -> None:
    ours, theirs = both()
    state = {**peft.get_peft_model_state_dict(theirs), "foo": torch.ones(1)}
    if ignore:
        state[FIRST] = torch.ones(3, 3)
    else:
        del state[FIRST]
    with pytest.warns(UserWarning, match="size mismatch") if ignore else nullcontext():
        result = veneer.set_peft_model_state_dict(ours, state, ignore_mismatched_sizes=ignore)
    with pytest.warns(UserWarning, match="not initialized") if ignore else nullcontext():
        expected = peft.set_peft_model_state_dict(theirs, state, ignore_mismatched_sizes=ignore)
    # peft counts the whole base as missing.
    assert result.missing_keys == [key for key in expected.missing_keys if ".default." in key]
    assert result.unexpected_keys == expected.unexpected_keys == ["foo"]


def test_it_is_set_in_place_and_the_next_call_uses_it() -> None:
    model, other = adapted(seed=1), adapted(seed=2)
    batch = inputs("llama")
    assert not torch.equal(logits(model, batch), logits(other, batch))
    parameters = model.adapters.parameters("default")
    veneer.set_peft_model_state_dict(model, veneer.get_peft_model_state_dict(other))
    assert all(a is b for a, b in zip(parameters, model.adapters.parameters("default"), strict=True))
    assert torch.equal(logits(model, batch), logits(other, batch))
    assert all(p.requires_grad for p in parameters)


def test_under_another_name_and_in_another_dtype() -> None:
    model, other = adapted(seed=1), adapted(seed=2)
    model.add_adapter("second", model.peft_config["default"])
    state = {key: tensor.bfloat16() for key, tensor in veneer.get_peft_model_state_dict(other).items()}
    veneer.set_peft_model_state_dict(model, state, adapter_name="second")
    second = veneer.get_peft_model_state_dict(model, adapter_name="second")
    assert all(t.dtype == torch.float32 and torch.equal(t, state[key].float()) for key, t in second.items())
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_in_the_base_stays_there(start: str) -> None:
    model = adapted(init_lora_weights=start)
    batch = inputs("llama")
    before, state = logits(model, batch), veneer.get_peft_model_state_dict(model)
    assert state[FIRST].shape == (4, 32)  # its own rank; saving it doubles that
    state = {key: tensor.clone() for key, tensor in state.items()}
    with torch.no_grad():
        for parameter in model.adapters.parameters("default"):
            parameter.zero_()
    assert not veneer.set_peft_model_state_dict(model, state).missing_keys
    assert torch.equal(logits(model, batch), before)


def test_a_prompt_with_an_encoder_takes_the_tokens_themselves() -> None:
    config = veneer.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, task_type="CAUSAL_LM")
    model = veneer.get_peft_model(build("llama"), config)
    tokens = torch.ones(3, 32)
    result = veneer.set_peft_model_state_dict(model, {"prompt_embeddings": tokens})
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(veneer.get_peft_model_state_dict(model)["prompt_embeddings"], tokens)
    assert model.active_adapters == ["default"]
    assert all(p.requires_grad for p in model.adapters.parameters("default"))


def test_the_rows_of_a_grown_vocabulary_come_along() -> None:
    model, other = adapted(), adapted()
    with torch.no_grad():
        other.get_base_model().get_input_embeddings().weight.add_(1)
    state = veneer.get_peft_model_state_dict(other, save_embedding_layers=True)
    assert veneer.set_peft_model_state_dict(model, state).unexpected_keys == []
    batch = inputs("llama")
    assert torch.equal(logits(model, batch), logits(other, batch))


def test_tensors_are_taken_from_the_state_of_the_whole_model() -> None:
    model, other = adapted(seed=1), adapted(seed=2)
    expected = veneer.get_peft_model_state_dict(other)
    compiled: Any = torch.compile(other, backend="eager")
    for state in (other.state_dict(), compiled.state_dict()):
        taken = veneer.get_peft_model_state_dict(model, state_dict=state)
        assert all(torch.equal(taken[key], tensor) for key, tensor in expected.items())
    assert veneer.get_peft_model_state_dict(compiled, unwrap_compiled=True).keys() == expected.keys()


def test_weights_are_read_from_a_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    weights = veneer.load_peft_weights(str(folder))
    model = adapted(seed=2)
    veneer.set_peft_model_state_dict(model, weights)
    assert torch.equal(logits(model, inputs("llama")), logits(adapted(), inputs("llama")))
    next(iter(weights.values())).zero_()  # a copy: the file stays
    assert veneer.load_peft_weights(folder, "cpu")[next(iter(weights))].any()
    mapped = veneer.load_peft_weights(folder, key_mapping={"layers": "blocks"})
    assert {key.replace("blocks", "layers") for key in mapped} == weights.keys() != mapped.keys()


def test_mistakes_leave_the_adapter_as_it_was(tmp_path: Path) -> None:
    model = adapted()
    state = veneer.get_peft_model_state_dict(model)
    before = {key: tensor.clone() for key, tensor in state.items()}
    wrong: dict[str, Tensor] = {**state, FIRST: torch.ones(3, 3)}
    with pytest.raises(BindError, match=r"size mismatch for .*lora_A.weight: \(3, 3\)"):
        veneer.set_peft_model_state_dict(model, wrong)
    with pytest.raises(NonFiniteError, match="NaN"):
        veneer.set_peft_model_state_dict(model, {FIRST: state[FIRST] * torch.nan})
    with pytest.raises(UnknownAdapterError, match="'other'"):
        veneer.set_peft_model_state_dict(model, state, adapter_name="other")
    with pytest.raises(UnknownAdapterError, match="'other'"):
        veneer.get_peft_model_state_dict(model, adapter_name="other")
    with pytest.raises(AdapterError, match="no tensor of the model's adapters"):
        veneer.get_peft_model_state_dict(model, state_dict={})
    with pytest.raises(BaseModelError, match="no model with adapters"):
        veneer.get_peft_model_state_dict(build("llama"))
    with pytest.raises(UnknownKeywordError, match="Did you mean revision"):
        veneer.load_peft_weights(saved_base(tmp_path), revison="main")
    assert all(torch.equal(t, before[key]) for key, t in veneer.get_peft_model_state_dict(model).items())
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        veneer.set_peft_model_state_dict(model, state)
    model.unmerge_adapter()
    veneer.prepare_model_for_compiled_hotswap(model, target_rank=8)
    with pytest.raises(UnsupportedError, match="hotswap_adapter"):
        veneer.set_peft_model_state_dict(model, state)


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")  # torch's, that one process is few, and that there is a newer way
@pytest.mark.parametrize(
    "config",
    [
        veneer.LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
        veneer.LoHaConfig(target_modules=["q_proj"], init_weights=False),
        veneer.BOFTConfig(target_modules=["q_proj"], boft_block_size=2, init_weights=False),
    ],
    ids=lambda config: str(config.peft_type),
)
def test_of_a_model_in_fsdp(config: Any) -> None:
    model = veneer.get_peft_model(build("qwen2"), config, seed=1).eval()  # its layers have biases
    expected = logits(model, inputs("llama"))
    sharded: Any = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    assert gap(logits(sharded, inputs("llama")), expected) < 1e-6
    state = veneer.get_peft_model_state_dict(sharded)
    again = veneer.get_peft_model(build("qwen2"), config, seed=2).eval()
    assert gap(logits(again, inputs("llama")), expected) > 0.02
    veneer.set_peft_model_state_dict(again, state)
    assert gap(logits(again, inputs("llama")), expected) < 1e-6


def test_new_adapter_without_values_gets_those_that_are_set() -> None:
    lora = veneer.LoraConfig(target_modules=["0"], init_lora_weights=False)
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = veneer.get_peft_model(copy.deepcopy(base), lora, low_cpu_mem_usage=True)
    assert {p.device.type for name, p in model.named_parameters() if "lora_" in name} == {"meta"}
    state = veneer.get_peft_model_state_dict(veneer.get_peft_model(copy.deepcopy(base), lora))
    veneer.set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    x = torch.randn(2, 4)
    expected = base(x) + x @ (state["base_model.model.0.lora_B.weight"] @ state["base_model.model.0.lora_A.weight"]).T
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_an_adapter_that_is_injected_again_is_made_anew() -> None:
    lora = veneer.LoraConfig(target_modules=["0"], init_lora_weights=False)
    base = veneer.inject_adapter_in_model(lora, torch.nn.Sequential(torch.nn.Linear(4, 4)))
    before = veneer.get_peft_model_state_dict(base)["0.lora_A.weight"].clone()
    veneer.inject_adapter_in_model(lora, base)
    assert not torch.equal(veneer.get_peft_model_state_dict(base)["0.lora_A.weight"], before)
