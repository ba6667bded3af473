"""Rows of one batch under several adapters, in models whose layers do not see the rows one after the other.

Each row has to be as under its adapter alone, and a row of the base as in the base; what cannot be is refused before
the pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import veneer
from tests.models import build, gap, inputs, tokens
from veneer.adapters import layout_probe
from veneer.errors import AdapterError, UnknownAdapterError

SPECIAL = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
TEXT = {**SPECIAL, **SIZES, "num_key_value_heads": 2}
PAIR = {"d_model": 32} | {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 40}.items()
}
NAMES = (["default", "__base__"], ["__base__", "other"], ["other", "default"])
CLOSE = 1e-5
IMAGE, VIDEO, BEGIN, END = 98, 97, 96, 95


# -- the models ----------------------------------------------------------------------------------------------


def xlnet() -> nn.Module:
    return tf.XLNetLMHeadModel(tf.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=40))


def longformer() -> nn.Module:
    own = {"max_position_embeddings": 64, "attention_window": 4}
    return tf.LongformerForMaskedLM(tf.LongformerConfig(**{**SPECIAL, **SIZES, **own, "pad_token_id": 1}))


def fsmt() -> nn.Module:
    own = {"langs": ["en", "de"], "src_vocab_size": 99, "tgt_vocab_size": 99, "max_position_embeddings": 64}
    return tf.FSMTForConditionalGeneration(tf.FSMTConfig(**PAIR, **own))


def nllb() -> nn.Module:
    own = {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "max_position_embeddings": 64}
    return tf.NllbMoeForConditionalGeneration(tf.NllbMoeConfig(**SPECIAL, **PAIR, **own, decoder_start_token_id=2))


def llama4() -> nn.Module:
    own = {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 40, "attention_chunk_size": 32}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**{**TEXT, **own, "num_hidden_layers": 2}))


def deepseek() -> nn.Module:
    own = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    sizes = {**TEXT, **own, **heads, "num_key_value_heads": 4, "first_k_dense_replace": 0}
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**sizes))


def gpt_oss() -> nn.Module:
    own = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": ["full_attention"]}
    return tf.GptOssForCausalLM(tf.GptOssConfig(**TEXT, **own))


def deberta() -> nn.Module:
    own = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 8}
    return tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(**SPECIAL, **SIZES, **own))


def patch_tst() -> nn.Module:
    own = {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 16}
    small = {"num_attention_heads": 2, "ffn_dim": 24, "num_hidden_layers": 1, "prediction_length": 4}
    return tf.PatchTSTForPrediction(tf.PatchTSTConfig(**own, **small))


def swin() -> nn.Module:
    own = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4}
    return tf.SwinForImageClassification(tf.SwinConfig(**own))


def qwen_vl() -> nn.Module:
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 32, "intermediate_size": 40}
    text = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    marks = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN}
    parts: Any = {"text_config": text, "vision_config": {**vision, "patch_size": 4, "fullatt_block_indexes": [0]}}
    return tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(**parts, **marks, vision_end_token_id=END))


def llava() -> nn.Module:
    vision = tf.CLIPVisionConfig(**{**SIZES, "num_hidden_layers": 2}, image_size=16, patch_size=4)
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=vision, image_token_index=IMAGE)
    return tf.LlavaForConditionalGeneration(config)


def pixtral() -> nn.Module:
    vision = {**SIZES, "model_type": "pixtral", "image_size": 32, "patch_size": 4}
    text = {**TEXT, "model_type": "mistral", "head_dim": 8}
    config = tf.Mistral3Config(text_config=text, vision_config=vision, image_token_id=IMAGE, spatial_merge_size=2)
    return tf.Mistral3ForConditionalGeneration(config)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Token ids, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def grids(*sides: int) -> dict[str, Tensor]:
    """For each row a square image of so many patches a side for Qwen-VL, or none."""
    rows = [[5, *([BEGIN, *[IMAGE] * (side // 2) ** 2, END] if side else []), 7, 8] for side in sides]
    pixels = noise(sum(side * side for side in sides), 96)
    return {**padded(rows), "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, s, s] for s in sides if s])}


def counts(*numbers: int) -> dict[str, Tensor]:
    """For each row so many images for LLaVA."""
    rows = [[5, *[IMAGE] * 16 * number, 6] for number in numbers]
    return {**padded(rows), "pixel_values": noise(sum(numbers), 3, 16, 16)}


def sized(*sides: int) -> dict[str, Tensor]:
    """For each row an image of so many pixels a side for Pixtral, or none."""
    rows = [[5, *[IMAGE] * (side // 8) ** 2, 6] for side in sides]
    real = [side for side in sides if side]
    sizes = torch.tensor([[side, side] for side in real])
    return {**padded(rows), "pixel_values": noise(len(real), 3, max(real), max(real)), "image_sizes": sizes}


def pair(rows: int = 2) -> dict[str, Tensor]:
    return {"input_ids": tokens(rows, 6)["input_ids"], "decoder_input_ids": tokens(rows, 4)["input_ids"]}


# -- what is right -------------------------------------------------------------------------------------------


def adapted(make: Callable[[], nn.Module], **options: Any) -> veneer.PeftModel:
    """A model with two adapters, ``default`` and ``other``, that change the output by a visible amount."""
    torch.manual_seed(0)
    model = veneer.get_peft_model(make(), veneer.LoraConfig(r=2, **options), seed=0)
    model.add_adapter("other", veneer.LoraConfig(r=3, **options), seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "_B" in name or "embedding_A" in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval()


@torch.no_grad()
def answers(model: veneer.PeftModel, batch: dict[str, Tensor], **choice: Any) -> Tensor:
    output = model(**batch, **choice)
    found: Tensor = output["logits"] if "logits" in output else output["prediction_outputs"]
    return found


def alone(model: veneer.PeftModel, batch: dict[str, Tensor], name: str) -> Tensor:
    with model.disable_adapter() if name == "__base__" else model.using(name):
        return answers(model, batch)


def check(model: veneer.PeftModel, batch: dict[str, Tensor]) -> None:
    expected = {name: alone(model, batch, name) for name in ("default", "other", "__base__")}
    assert gap(expected["default"], expected["__base__"]) > 1e-2
    mask = batch.get("attention_mask")
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    bank = model.bank(slots=2) if frozen else None
    leases = {name: bank.lease(name) for name in ("default", "other")} if bank else {}
    for names in NAMES:
        plan = [bank.plan([leases.get(name) for name in names])] if bank else []
        for choice in (names, *plan):
            found = answers(model, batch, adapter_names=choice)
            for row, name in enumerate(names):
                real = slice(None) if mask is None else mask[row].bool()
                assert gap(found[row][real], expected[name][row][real]) < CLOSE


ALL = {"target_modules": "all-linear"}
RIGHT: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    "sequence first": (xlnet, {"target_modules": ["layer_1", "layer_2"]}, lambda: tokens(2, 6)),
    "its embedding": (xlnet, {"target_modules": ["word_embedding"]}, lambda: tokens(2, 6)),
    "as long as there are rows": (xlnet, {"target_modules": ["layer_1", "layer_2"]}, lambda: tokens(2, 2)),
    "half of it": (longformer, ALL, lambda: tokens(2, 6)),
    "encoder and decoder": (fsmt, ALL, pair),
    "once for each expert": (
        llama4,
        {"target_parameters": ["experts.down_proj"], "target_modules": []},
        lambda: tokens(2, 4),
    ),
    "tokens in a row": (gpt_oss, {"target_parameters": ["experts.down_proj"], **ALL}, lambda: tokens(2, 4)),
    "a row of output for each token": (deepseek, ALL, lambda: tokens(2, 4)),
    "channels": (patch_tst, ALL, lambda: {"past_values": noise(2, 32, 2)}),
    "windows": (swin, ALL, lambda: {"pixel_values": noise(2, 3, 32, 32)}),
    "images of one size": (qwen_vl, ALL, lambda: grids(4, 4)),
    "images of two sizes": (qwen_vl, ALL, lambda: grids(4, 8)),
    "an image and none": (qwen_vl, ALL, lambda: grids(4, 0)),
    "none and an image": (qwen_vl, ALL, lambda: grids(0, 4)),
    "an image and three": (llava, ALL, lambda: counts(1, 3)),
    "an image and two": (llava, ALL, lambda: counts(1, 2)),
    "two images and none": (llava, ALL, lambda: counts(2, 0)),
    "images in one sequence": (pixtral, ALL, lambda: sized(16, 16)),
    "one of them": (pixtral, ALL, lambda: sized(16, 0)),
    "no change of images": (pixtral, {"target_modules": ".*language_model.*q_proj"}, lambda: sized(16, 8)),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_each_row_is_as_under_its_adapter_alone(kind: str) -> None:
    make, options, batch = RIGHT[kind]
    model = adapted(make, **options)
    check(model, batch())
    model.set_requires_grad(["default", "other"], False)
    check(model, batch())


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Callable[[], dict[str, Tensor]], str]] = {
    "routed experts": (nllb, {"target_modules": ["fc1", "fc2"]}, pair, r"encoder\.layers\.1\.ffn\.experts\.expert_0"),
    "positions": (deberta, {"target_modules": ["query_proj"]}, lambda: tokens(2, 6), "query_proj does not see"),
    "sizes that only the image has": (pixtral, ALL, lambda: sized(16, 8), "image_sizes gives these sizes"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_is_refused_before_the_pass(kind: str) -> None:
    make, options, batch, said = REFUSED[kind]
    model = adapted(make, **options)
    passes: list[Any] = []
    answers(model, batch())  # nothing else is
    with pytest.raises(AdapterError, match=said) as caught:
        answers(model, batch(), adapter_names=["default", "other"])
    assert "model.using(name)" in str(caught.value)
    model.get_base_model().register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(AdapterError, match=said):
        answers(model, batch(), adapter_names=["default", "__base__"])
    assert len(passes) in (0, 4, 6)  # none, or those that look again
    both = answers(model, batch(), adapter_names=["other", "other"])
    assert gap(both, alone(model, batch(), "other")) < CLOSE


def test_experts_beside_others_do_not_hinder_them() -> None:
    model = adapted(nllb, target_modules=["q_proj", "v_proj"])
    model.add_adapter("routed", veneer.LoraConfig(target_modules=["fc1"]), seed=3)
    check(model, pair())


# -- generation, training, packing -----------------------------------------------------------------------------


@torch.no_grad()
def test_generation_with_images_and_beams() -> None:
    model, batch = adapted(qwen_vl, **ALL), grids(4, 8)
    for beams in (1, 2):
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        found = model.generate(**batch, adapter_names=["default", "other"], **options)
        for row, name in enumerate(["default", "other"]):
            with model.using(name):
                expected = model.generate(**batch, **options)[row]
            assert torch.equal(found[row][: len(expected)], expected)


@torch.no_grad()
def test_generation_where_the_sequence_comes_first() -> None:
    model, ids = adapted(fsmt, **ALL), tokens(2, 5)["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2, "do_sample": False}
    found = model.generate(input_ids=ids, adapter_names=["default", "other"], **options)
    for row, name in enumerate(["default", "other"]):
        with model.using(name):
            assert torch.equal(found[row], model.generate(input_ids=ids, **options)[row])


@torch.no_grad()
def test_generation_from_sound() -> None:
    model = adapted(lambda: build("whisper"), target_modules=["q_proj", "v_proj"])
    batch = {"input_features": inputs("whisper")["input_features"]}
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    found = model.generate(**batch, adapter_names=["default", "other"], **options)
    for row, name in enumerate(["default", "other"]):
        with model.using(name):
            expected = model.generate(**batch, **options)[row]
        assert torch.equal(found[row][: len(expected)], expected)


def test_gradients_reach_the_adapter_of_each_row() -> None:
    model, batch = adapted(xlnet, target_modules=["layer_1"]), tokens(2, 6)
    model.train().requires_grad_(True)
    model(**batch, adapter_names=["default", "__base__"]).logits[1].square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "lora" in n}
    assert all(grad is None or not grad.any() for grad in grads.values())  # row 1 is the base's
    assert model.training
    assert all(module.training for module in model.modules())


def test_packed_sequences_where_tokens_come_once_for_each_expert() -> None:
    model = adapted(llama4, target_parameters=["experts.down_proj"], target_modules=[])
    ids = tokens(1, 6)
    expected = {name: alone(model, ids, name) for name in ("default", "other")}
    found = answers(model, ids, adapter_names=[("default", 4), ("other", 2)])
    assert gap(found[0, :4], expected["default"][0, :4]) < CLOSE  # what comes later is not seen
    whole = answers(model, ids, adapter_names=[("other", 6)])
    assert gap(whole, expected["other"]) < CLOSE
    with pytest.raises(AdapterError, match="5 tokens, and the batch 6 tokens"):
        answers(model, ids, adapter_names=[("other", 5)])


def test_modules_that_are_saved_whole_go_by_the_same_rows() -> None:
    torch.manual_seed(0)
    config = veneer.LoraConfig(r=2, target_modules=["layer_1"], modules_to_save=["layer_2"])
    model = veneer.get_peft_model(xlnet(), config, seed=0).eval()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(4))
    batch = tokens(2, 6)
    expected = {name: alone(model, batch, name) for name in ("default", "__base__")}
    assert gap(expected["default"], expected["__base__"]) > 1e-2
    found = answers(model, batch, adapter_names=["__base__", "default"])
    assert gap(found[0], expected["__base__"][0]) < CLOSE
    assert gap(found[1], expected["default"][1]) < CLOSE


def test_tasks_of_rows_that_a_layer_does_not_see_in_order_are_refused() -> None:
    config = veneer.PolyConfig(target_modules=["layer_1"], r=2, n_tasks=2, n_skills=2)
    model = veneer.get_peft_model(xlnet(), config, seed=0).eval()
    with pytest.raises(AdapterError, match=r"layer_1 does not see the rows"):
        answers(model, tokens(2, 6), task_ids=torch.tensor([0, 1]))


def test_an_invocation_in_rows_that_a_layer_does_not_see_in_order_is_refused() -> None:
    config = veneer.LoraConfig(target_modules=["layer_1"], alora_invocation_tokens=[7], task_type="CAUSAL_LM")
    model = veneer.get_peft_model(xlnet(), config, seed=0).eval()
    answers(model, tokens(1, 6))
    with pytest.raises(AdapterError, match=r"layer_1 does not see the rows"):
        answers(model, tokens(2, 6))


# -- how it is found out -----------------------------------------------------------------------------------------


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each look at a model."""
    seen: list[int] = []
    observed = layout_probe.observed

    def counted(*args: Any) -> Any:
        seen.append(1)
        return observed(*args)

    monkeypatch.setattr(layout_probe, "observed", counted)
    return seen


def test_a_model_is_looked_at_once_and_again_for_new_layers(probes: list[int]) -> None:
    model, batch = adapted(xlnet, target_modules=["layer_1"]), tokens(2, 6)
    answers(model, batch)
    answers(model, batch, adapter_names=["other", "other"])
    assert not probes
    for names in NAMES:
        answers(model, batch, adapter_names=names)
    assert len(probes) == 1
    model.add_adapter("more", veneer.LoraConfig(target_modules=["layer_2"]), seed=3)
    answers(model, batch, adapter_names=["more", "default"])
    assert len(probes) == 2
    again = copy.deepcopy(model)
    again.rename_adapter("more", "most")
    answers(again, batch, adapter_names=["most", "default"])
    assert len(probes) == 2
    check(again, batch)


def test_layers_that_see_images_are_looked_at_when_there_are_some(probes: list[int]) -> None:
    model = adapted(qwen_vl, target_modules=["q_proj", "qkv"])
    check(model, tokens(2, 6))
    before = len(probes)
    answers(model, grids(4, 8), adapter_names=["default", "other"])
    assert len(probes) == before + 1
    answers(model, grids(8, 4), adapter_names=["default", "other"])
    assert len(probes) == before + 1


def test_a_look_leaves_no_trace() -> None:
    model, batch = adapted(qwen_vl, **ALL), grids(4, 8)
    base = model.get_base_model()
    answers(model, batch)
    model.train()
    part = base.model.language_model.layers[0]
    part.eval()
    modes = [module.training for module in model.modules()]
    offset, state = base.model.rope_deltas, torch.get_rng_state()
    with model.adapters.using(model._checked(model.adapters.rows(["default", "other"]), (), batch)):
        pass
    assert [module.training for module in model.modules()] == modes
    assert base.model.rope_deltas is offset
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for layer in model.adapters.layers.values() for module in layer.modules())


def test_names_for_another_number_of_rows_are_refused() -> None:
    model = adapted(xlnet, target_modules=["layer_1"])
    with pytest.raises(AdapterError, match="2 names, and the batch 4 rows"):
        answers(model, tokens(4, 6), adapter_names=["default", "other"])


def test_continuous_batching_checks_the_names_of_its_prompts() -> None:
    model = adapted(gpt_oss, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="2 names for 1 prompts"):
        model.generate_batch([[5, 6, 7]], adapter_names=["default", "__base__"])
    with pytest.raises(UnknownAdapterError, match="no adapter 'nobody'"):
        model.generate_batch([[5, 6, 7]], adapter_names=["nobody"])
    with pytest.raises(AdapterError, match="A manager that outlives the call keeps to one adapter"):
        model.generate_batch([[5, 6, 7]], adapter_names=["default"], persistent_manager=True)


class Attends(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_s_attention_tells_rows_apart_along_its_first_dimension_alone(batch_first: bool) -> None:
    config = veneer.LoraConfig(target_modules=["attention"], init_lora_weights=False)
    model = veneer.get_peft_model(Attends(batch_first), config, seed=1).eval()
    model.add_adapter("other", config, seed=2)
    x, names = torch.randn(3, 5, 8), ["default", "other", "__base__"]
    if not batch_first:
        for rows in (x, x[:, 0]):
            with pytest.raises(veneer.MixedBatchError, match="mixed adapter batches without batch_first"):
                model(rows, adapter_names=names)
        return
    with torch.no_grad():
        together = model(x, adapter_names=names)
        for row, name in enumerate(names):
            alone = model(x[row : row + 1], adapter_names=[name])
            assert gap(together[row : row + 1], alone) < CLOSE
