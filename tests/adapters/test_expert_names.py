"""New adapters for layers that are parameters since version 5 of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import veneer
from tests.models import LLAMA, gap, logits, tokens
from tests.random_adapters import enlarge
from veneer.errors import TargetError

ONE = {**LLAMA, "num_hidden_layers": 1, "num_experts_per_tok": 2}


def qwen3() -> Any:
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**ONE, head_dim=8, num_experts=4, moe_intermediate_size=16))


def mixtral() -> Any:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**ONE, num_local_experts=4))


def qwen2() -> Any:
    """With experts that all tokens share, which are layers still."""
    shared = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    return tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**ONE, **shared))


def llama4() -> Any:
    """Its experts have never been layers, and its router is a layer that returns two tensors."""
    own = {**ONE, "num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 40, "attention_chunk_size": 32}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**{**own, "num_experts_per_tok": 1}))


def deepseek() -> Any:
    """With a dense block, and shared experts in the other."""
    heads = {"num_hidden_layers": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "v_head_dim": 8}
    own = {**ONE, **heads, **experts, "num_key_value_heads": 4}
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**own, first_k_dense_replace=1))


def gpt_oss() -> Any:
    """Its experts have never been layers."""
    return tf.GptOssForCausalLM(tf.GptOssConfig(**ONE, head_dim=8, num_local_experts=4))


def made(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def trained(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (qwen3, ["q_proj", "gate_proj", "up_proj", "down_proj"]),
        (qwen3, ["q_proj", "down_proj"]),
        (qwen3, ["q_proj", "gate"]),
        (qwen3, "all-linear"),
        (qwen3, r".*\.(q_proj|gate_proj|up_proj|down_proj)"),
        (mixtral, ["q_proj", "w1", "w2", "w3"]),
        (mixtral, "all-linear"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_the_usual_names_train_what_pefts_do(make: Callable[[], nn.Module], targets: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*pattern keys did not match")  # of its own making
        theirs = peft.get_peft_model(made(make), peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets))
    ours = veneer.get_peft_model(made(make), veneer.LoraConfig(r=2, lora_alpha=6, target_modules=targets))
    assert trained(ours) == trained(theirs)
    mine, of_peft = ours.peft_config["default"], theirs.peft_config["default"]
    assert set(mine.target_modules) == of_peft.target_modules
    assert set(mine.target_parameters) == of_peft.target_parameters
    assert (mine.rank_pattern, mine.alpha_pattern) == (of_peft.rank_pattern, of_peft.alpha_pattern)
    for name, layer in ours.named_modules():
        if hasattr(layer, "own_tensors"):
            assert layer.scaling == theirs.get_submodule(name).scaling  # type: ignore[operator]


@pytest.mark.parametrize("make", [qwen3, qwen2, mixtral, llama4])
@pytest.mark.filterwarnings("ignore:.all-linear. leaves out the experts")
def test_what_is_trained_is_loaded_again_here_and_in_peft(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    wanted = veneer.LoraConfig(r=2, target_modules="all-linear", rank_pattern={"v_proj": 3})
    model = veneer.get_peft_model(made(make), wanted).eval()
    enlarge(model, "default")
    batch = tokens()
    expected = logits(model, batch)
    assert gap(logits(made(make), batch), expected) > 1e-2
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(veneer.PeftModel.from_pretrained(made(make), tmp_path), batch), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(made(make), str(tmp_path))
    assert gap(logits(theirs, batch), expected) < 1e-5
    assert gap(logits(model.merge_and_unload(), batch), expected) < 1e-5


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "router"]])
@pytest.mark.filterwarnings("ignore:.all-linear. leaves out the experts")
def test_a_router_that_returns_more_than_its_product_is_a_parameter(targets: Any) -> None:
    """peft's layer in its place fails in the forward pass."""
    model = veneer.get_peft_model(made(llama4), veneer.LoraConfig(target_modules=targets))
    chosen: Any = model.peft_config["default"]
    assert chosen.target_parameters == ["router.weight"]
    assert any("router.lora_A" in name for name in trained(model))
    with pytest.warns(UserWarning, match="are left out: VERA adapts no parameters"):
        veneer.get_peft_model(made(llama4), veneer.VeraConfig(target_modules="all-linear", r=2))


def test_layers_named_as_experts_are_adapted_too_and_are_left_out_by_name_for_peft(tmp_path: Path) -> None:
    """peft adapts the routed experts alone, and drops the other layers of an adapter that has them."""

    def new(**filters: Any) -> Any:
        names = ["o_proj", "gate_proj", "up_proj", "down_proj"]
        return veneer.get_peft_model(made(deepseek), veneer.LoraConfig(r=2, target_modules=names, **filters)).eval()

    beside = {name for name in trained(new()) if "shared_experts" in name or "layers.0.mlp" in name}
    assert len(beside) == 12
    model = new(exclude_modules=r".*(shared_experts|layers\.0\.mlp)\..*")
    assert trained(model).keys() == trained(new()).keys() - beside
    enlarge(model, "default")
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(made(deepseek), str(tmp_path))
    assert gap(logits(theirs, tokens()), expected) < 1e-5


def test_layers_that_are_left_stay_beside_the_parameters() -> None:
    model = veneer.get_peft_model(made(qwen2), veneer.LoraConfig(target_modules=["gate_proj", "up_proj"]))
    found: Any = model.peft_config["default"]
    assert found.target_modules == {"gate_proj", "up_proj"}
    assert found.target_parameters == ["gate_up_proj"]  # as in peft
    assert any("shared_expert.up_proj.lora_A" in name for name in trained(model))


@pytest.mark.parametrize("pattern", [r".*(q_proj|gate_proj|up_proj)", r".*experts\..*_proj"])
def test_a_regular_expression_means_them_too(pattern: str) -> None:
    model = veneer.get_peft_model(made(qwen3), veneer.LoraConfig(target_modules=pattern))
    assert any("mlp.experts" in name for name in trained(model))
    assert any("q_proj" in name for name in trained(model)) == ("q_proj" in pattern)


def test_filters_and_patterns_are_those_of_the_layers() -> None:
    def targets(**options: Any) -> Any:
        own = veneer.LoraConfig(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], r=2, **options)
        return veneer.get_peft_model(made(qwen3), own).peft_config["default"]

    assert targets(exclude_modules=["down_proj"]).target_parameters == ["gate_up_proj"]
    assert targets(exclude_modules=r".*experts.*").target_parameters is None
    found = targets(rank_pattern={"gate_proj": 3, "up_proj": 3}, alpha_pattern={"gate_proj": 12, "up_proj": 12})
    assert found.rank_pattern[r".*\.gate_up_proj"] == 6
    assert found.alpha_pattern[r".*\.gate_up_proj"] == 24
    with pytest.raises(TargetError, match=r"are one matrix now.*scales of their own"):
        targets(rank_pattern={"gate_proj": 3})


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}])
def test_experts_that_cannot_have_it_are_left_out_with_a_word(options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=r"The experts \(.*\) are left out: .*not available|is not"):
        model = veneer.get_peft_model(made(qwen3), veneer.LoraConfig(target_modules="all-linear", r=2, **options))
    assert not any("experts" in name for name in trained(model))


def test_another_method_leaves_them_out_with_a_word() -> None:
    with pytest.warns(UserWarning, match="left out: VERA adapts no parameters"):
        veneer.get_peft_model(made(qwen3), veneer.VeraConfig(target_modules=["q_proj", "down_proj"], r=2))


@pytest.mark.parametrize(
    ("make", "targets", "words"),
    [
        (qwen3, ["q_proj", "gate_proj"], "The experts are left out of 'gate_proj': gate and up are one matrix"),
        (qwen2, ["q_proj", "up_proj"], "The experts are left out of 'up_proj'"),
        (gpt_oss, ["q_proj", "down_proj"], "target_modules names 'down_proj'.*It is a parameter: see target_param"),
        (gpt_oss, "all-linear", '"all-linear" leaves out the experts, which are parameters'),
    ],
)
def test_what_names_do_not_reach_is_told(make: Callable[[], nn.Module], targets: Any, words: str) -> None:
    with pytest.warns(UserWarning, match=words) as caught:
        veneer.get_peft_model(made(make), veneer.LoraConfig(target_modules=targets))
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("targets", "idle"),
    [
        (["gate_proj", "up_proj", "down_proj", "q_prj"], "target_modules names 'q_prj'"),
        (["q_prj", "gate"], "target_modules names 'q_prj'"),
    ],
)
def test_experts_are_targets_enough(targets: list[str], idle: str) -> None:
    with pytest.warns(UserWarning, match=idle) as caught:
        model = veneer.get_peft_model(made(qwen3), veneer.LoraConfig(target_modules=targets))
    assert len(caught) == 1
    assert len(trained(model)) > 0
    assert all("mlp" in name for name in trained(model))
