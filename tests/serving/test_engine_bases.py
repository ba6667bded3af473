"""Bases of several architectures are served rightly, each in the quickest way that fits it."""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from tests.models import LLAMA, TEXT, build
from tests.serving.engine_world import World, lora, prompts, request, run, running, tokens_of
from veneer.printing import VeneerWarning

SMALL = {**LLAMA, "head_dim": 8}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
PACKED, PAGED, STATIC = "veneer_packed", "sdpa", "StaticLane"


def gemma2() -> Any:
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**SMALL, sliding_window=8))


def gemma3() -> Any:
    layers = ["sliding_attention", "full_attention"]
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SMALL, sliding_window=8, layer_types=layers))


def qwen3_next() -> Any:
    linear = {
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }  # fmt: skip
    experts = {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 16}
    layers = ["linear_attention", "full_attention"]
    return tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(**SMALL, **linear, **experts, layer_types=layers))


def deepseek() -> Any:
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    config = tf.DeepseekV3Config(**{**LLAMA, "num_key_value_heads": 4}, **heads, **experts)
    return tf.DeepseekV3ForCausalLM(config)


def mixtral() -> Any:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2))


def mamba() -> Any:
    return tf.MambaForCausalLM(tf.MambaConfig(**TEXT, hidden_size=16, num_hidden_layers=2, state_size=4))


@pytest.mark.parametrize(
    ("make", "targets", "way"),
    [
        (lambda: build("gpt2"), ["c_attn", "mlp.c_proj"], PACKED),
        (mixtral, ["q_proj", "v_proj"], PACKED),
        (gemma3, ["q_proj", "v_proj"], PAGED),
        (gemma2, ["q_proj", "down_proj"], "paged|eager"),
        (qwen3_next, ["q_proj", "in_proj_qkvz"], STATIC),
        (deepseek, ["o_proj"], STATIC),
        (mamba, ["in_proj"], STATIC),
    ],
)
def test_a_base_is_served(make: Any, targets: list[str], way: str, tmp_path: Path) -> None:
    def made() -> Any:
        torch.manual_seed(0)
        return make().float().eval()

    configs = {
        "one": lora(2, target_modules=targets),
        "two": lora(3, target_modules=targets, use_dora=True),
    }
    world = World(tmp_path, configs, made)
    asked = [request(number, prompt, [None, *configs][number % 3]) for number, prompt in enumerate(prompts(9))]

    async def main() -> Any:
        for name, folder in world.folders.items():
            await engine.load(name, folder)
        return await asyncio.gather(*(tokens_of(engine, one) for one in asked))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)
        with running(model=made()) as engine:
            assert way in (engine.model.config._attn_implementation, type(engine._lane).__name__)
            answers = run(main())
    assert answers == [world.answer(one.version, one.prompt, 8) for one in asked]


def test_a_lane_that_cannot_start_leaves_the_attention_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(manager: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr("veneer.serving.continuous_batching.ContinuousBatchingManager.warmup", fail)
    model = build("gpt2")
    attention = model.config._attn_implementation
    warnings.simplefilter("always", VeneerWarning)
    with warnings.catch_warnings(record=True) as caught, running(model=model) as engine:
        assert type(engine._lane).__name__ == STATIC
        assert engine.model.config._attn_implementation == attention
    lines = [str(warning.message) for warning in caught]
    assert [line.rpartition(": ")[2] for line in lines] == ["no room."] * 2
