"""Adapters that say a layer's old name, against the same adapter under the name of today."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from tests.models import BLOCKS, LLAMA, TEXT, gap
from tests.random_adapters import CONFIG, WEIGHTS, enlarge

CLOSE = 1e-5
PREFIX = "base_model.model."
PIXELS = {"image_size": 16, "patch_size": 4}


def vit() -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(**BLOCKS, **PIXELS, intermediate_size=48, num_labels=3))


def deit() -> nn.Module:
    return tf.DeiTForImageClassification(tf.DeiTConfig(**BLOCKS, **PIXELS, intermediate_size=48, num_labels=3))


def beit() -> nn.Module:
    return tf.BeitForImageClassification(tf.BeitConfig(**BLOCKS, **PIXELS, intermediate_size=48, num_labels=3))


def dinov2() -> nn.Module:
    return tf.Dinov2ForImageClassification(tf.Dinov2Config(**BLOCKS, **PIXELS, mlp_ratio=2, num_labels=3))


def dinov3() -> nn.Module:
    return tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**BLOCKS, **PIXELS, intermediate_size=48))


def swin() -> nn.Module:
    sizes: dict[str, Any] = {"embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4, "num_labels": 3}
    return tf.SwinForImageClassification(tf.SwinConfig(**PIXELS, **sizes))


def segformer() -> nn.Module:
    sizes: dict[str, Any] = {"num_encoder_blocks": 2, "depths": [2, 1], "hidden_sizes": [16, 32], "sr_ratios": [2, 1]}
    more: dict[str, Any] = {"num_attention_heads": [1, 2], "patch_sizes": [7, 3], "strides": [4, 2]}
    config = tf.SegformerConfig(**sizes, **more, mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3)
    return tf.SegformerForImageClassification(config)


LANGUAGE = {**LLAMA, "vocab_size": 99, "num_hidden_layers": 2}


def qwen() -> nn.Module:
    text = {**LANGUAGE, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    vision: dict[str, Any] = {"depth": 1, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"intermediate_size": 40, "patch_size": 4, "fullatt_block_indexes": [0]}
    ids = {"image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}
    config = tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, bos_token_id=1, eos_token_id=2, **ids)
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def llava() -> nn.Module:
    vision = tf.CLIPVisionConfig(**BLOCKS, intermediate_size=40, image_size=16, patch_size=8)
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(**LANGUAGE), vision_config=vision, image_token_index=98)
    return tf.LlavaForConditionalGeneration(config)


def phimoe() -> nn.Module:
    sizes = {**LANGUAGE, "num_local_experts": 3, "num_experts_per_tok": 2}
    return tf.PhimoeForCausalLM(tf.PhimoeConfig(**sizes))


def of_image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))}


def of_patches() -> dict[str, Tensor]:
    """An image of two by two patches, of which the tower makes one token."""
    ids = torch.tensor([[5, 96, 98, 95, 7]])
    pixels = torch.randn(4, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(2))
    grid = torch.tensor([[1, 2, 2]])
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == 98).int()}


def of_image_and_words() -> dict[str, Tensor]:
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return {"input_ids": torch.tensor([[5, 98, 98, 98, 98, 7, 8]]), "pixel_values": images}


def of_words() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[5, 6, 7, 8]])}


def _replaced(*pairs: tuple[str, str]) -> Callable[[str], str]:
    def old(name: str) -> str:
        for now, before in pairs:
            name = re.sub(now, before, name)
        return name

    return old


PARTS = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
JOINED = tuple((f"attention.{now}", f"attention.attention.{before}") for now, before in PARTS)
APART = tuple((f"attention.{now}", f"attention.self.{before}") for now, before in PARTS)
OUTPUT = (("attention.o_proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"))
VIT = (*JOINED, *OUTPUT, ("mlp.fc2", "output.dense"), (r"(?<=[td])\.layers", ".encoder.layer"))


@dataclass(frozen=True)
class Case:
    """A model, and an adapter of before.

    Attributes:
        make: the model.
        feed: a batch for it.
        old: what a module was called.
        options: of the adapter, under the names of today.
        before: those of them that its config said otherwise.
    """

    make: Callable[[], nn.Module]
    feed: Callable[[], dict[str, Tensor]]
    old: Callable[[str], str]
    options: dict[str, Any]
    before: dict[str, Any]


QV = {"target_modules": ["q_proj", "v_proj"]}
OLD_QV = {"target_modules": ["query", "value"]}
HEAD = {"modules_to_save": ["classifier"]}
RANKS = {"rank_pattern": {r"0\.attention\.q_proj": 2}, "alpha_pattern": {"v_proj": 2}}
OLD_RANKS = {"rank_pattern": {r"0\.attention\.attention\.query": 2}, "alpha_pattern": {"value": 2}}
OLD_QWEN = _replaced(("^model.language_model", "model"), ("^model.visual", "visual"))
OLD_LLAVA = _replaced(
    ("^model.language_model", "language_model.model"),
    ("^model.vision_tower", "vision_tower.vision_model"),
    ("^model.multi_modal_projector", "multi_modal_projector"),
    ("^lm_head", "language_model.lm_head"),
)
TEXT_ONLY = r".*language_model.*q_proj"
CASES = {
    "vit": Case(vit, of_image, _replaced(*VIT), {**QV, **HEAD}, OLD_QV),
    "vit, ranks": Case(vit, of_image, _replaced(*VIT), {**QV, **RANKS}, {**OLD_QV, **OLD_RANKS}),
    "vit, a regex": Case(
        vit,
        of_image,
        _replaced(*VIT),
        {"target_modules": r".*layers\.1\.(attention\.q_proj|mlp\.fc2)"},
        {"target_modules": r".*encoder\.layer\.1\.(attention\.attention\.query|output\.dense)"},
    ),
    "vit, some blocks": Case(
        vit,
        of_image,
        _replaced(*VIT),
        {**QV, "layers_to_transform": [1], "layers_pattern": "layers"},
        {**OLD_QV, "layers_to_transform": [1], "layers_pattern": "layer"},
    ),
    "vit, without some": Case(
        vit,
        of_image,
        _replaced(*VIT),
        {"target_modules": ["o_proj", "fc2"], "exclude_modules": ["0.mlp.fc2"]},
        {"target_modules": ["output.dense"], "exclude_modules": ["0.output.dense"]},
    ),
    "deit": Case(deit, of_image, _replaced(*VIT), QV, OLD_QV),
    "beit": Case(beit, of_image, _replaced(*VIT), QV, OLD_QV),
    "dinov2": Case(dinov2, of_image, _replaced(*JOINED, *OUTPUT[:1]), QV, OLD_QV),
    "dinov3": Case(dinov3, of_image, _replaced((r"^model\.layer", "layer")), QV, QV),
    "swin": Case(swin, of_image, _replaced(*APART), {**QV, **HEAD}, OLD_QV),
    "segformer": Case(
        segformer, of_image, _replaced(*APART, (r"stages\.(\d+)\.blocks", r"encoder.block.\1")), QV, OLD_QV
    ),
    "phimoe, the router": Case(
        phimoe,
        of_words,
        _replaced(("mlp.router", "block_sparse_moe.gate")),
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.router.weight"]},
        {"target_modules": ["q_proj", "gate"], "target_parameters": None},
    ),
    "qwen2.5-vl": Case(qwen, of_patches, OLD_QWEN, {"target_modules": ["q_proj", "qkv"]}, {}),
    "llava": Case(llava, of_image_and_words, OLD_LLAVA, QV, {}),
    "llava, a tower of 4.52": Case(
        llava,
        of_image_and_words,
        _replaced(("^model.vision_tower", "model.vision_tower.vision_model")),
        {"target_modules": ["q_proj"]},
        {},
    ),
    "llava, the projector": Case(
        llava, of_image_and_words, OLD_LLAVA, {"target_modules": ["linear_1", "linear_2"]}, {}
    ),
    "llava, the projector whole": Case(
        llava,
        of_image_and_words,
        OLD_LLAVA,
        {"target_modules": TEXT_ONLY, "modules_to_save": ["multi_modal_projector"]},
        {},
    ),
    "llava, the head": Case(
        llava,
        of_image_and_words,
        OLD_LLAVA,
        {"target_modules": TEXT_ONLY + "|lm_head"},
        {"target_modules": TEXT_ONLY + r"|language_model\.lm_head"},
    ),
    "llava, tokens": Case(
        llava,
        of_image_and_words,
        OLD_LLAVA,
        {"target_modules": TEXT_ONLY, "trainable_token_indices": {"model.language_model.embed_tokens": [5, 7]}},
        {"trainable_token_indices": {"language_model.model.embed_tokens": [5, 7]}},
    ),
}


def build(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@torch.no_grad()
def answer(model: nn.Module, case: Case) -> Tensor:
    result: Tensor = model(**case.feed())[0]
    return result


def new(case: Case, folder: Path) -> tuple[Path, Tensor]:
    """The adapter under the names of today, and what the model answers with it."""
    config = veneer.LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **case.options})
    model = veneer.get_peft_model(build(case.make), config, seed=1).eval()
    enlarge(model, "default")
    model.save_pretrained(folder)
    return folder, answer(model, case)


def old(case: Case, folder: Path, **changes: Any) -> tuple[Path, Tensor]:
    """The same as it was saved before."""
    _, expected = new(case, folder)
    tensors = load_file(folder / WEIGHTS)
    renamed = {PREFIX + case.old(key.removeprefix(PREFIX)): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **case.before, **changes}))
    return folder, expected


@pytest.mark.parametrize("name", CASES)
def test_a_name_of_before_is_read_as_todays(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder, expected = old(case, tmp_path / "old")
    assert gap(answer(build(case.make), case), expected) > 0.02
    model = veneer.PeftModel.from_pretrained(build(case.make), folder)
    assert gap(answer(model, case), expected) < CLOSE
    notes = model.load_report.warnings
    assert len(notes) == (2 if "router" in name else 1)
    assert "Older layout" in notes[0]
    # What is saved needs no reading any more, and its config means what it did.
    model.save_pretrained(tmp_path / "now")
    again = veneer.PeftModel.from_pretrained(build(case.make), tmp_path / "now")
    assert not again.load_report.warnings
    assert gap(answer(again, case), expected) < CLOSE
    assert load_file(tmp_path / "now" / WEIGHTS).keys() == load_file(new(case, tmp_path / "new")[0] / WEIGHTS).keys()


@pytest.mark.parametrize("name", ["vit", "swin", "dinov3", "segformer", "llava, the projector whole"])
def test_merged_from_disk_it_is_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder, expected = old(case, tmp_path / "old")
    build(case.make).save_pretrained(tmp_path / "base")
    loaded = veneer.load(folder, base=tmp_path / "base")
    assert gap(answer(loaded, case), expected) < CLOSE
    report = veneer.merge(folder, tmp_path / "base", out=tmp_path / "merged")
    assert any("Older layout" in warning for warning in report.warnings)
    merged = type(build(case.make)).from_pretrained(tmp_path / "merged").eval()
    assert gap(answer(merged, case), expected) < CLOSE


def test_a_layer_that_is_missing_is_missed_under_its_old_name_too(tmp_path: Path) -> None:
    case = CASES["vit"]
    folder, _ = old(case, tmp_path)
    tensors = load_file(folder / WEIGHTS)
    kept = {key: tensor for key, tensor in tensors.items() if "layer.1.attention.attention.value" not in key}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(veneer.BindError, match=r"layers\.1\.attention\.v_proj: the config targets it"):
        veneer.PeftModel.from_pretrained(build(case.make), folder)


def test_an_adapter_is_swapped_for_one_of_before(tmp_path: Path) -> None:
    case = CASES["dinov3"]
    folder, expected = old(case, tmp_path / "old")
    model = veneer.get_peft_model(build(case.make), veneer.LoraConfig(r=4, lora_alpha=8, **case.options))
    model.eval()
    veneer.hotswap_adapter(model, folder)
    assert gap(answer(model, case), expected) < CLOSE


@pytest.mark.parametrize(
    ("now", "before"),
    [
        (r"^model\.", ""),  # of a backbone, for a model with a head
        (r"\.self_attn\.", ".attention."),  # transformers has no such rule for this family
    ],
)
def test_a_name_that_no_rule_explains_is_not_taken(now: str, before: str, tmp_path: Path) -> None:
    def llama() -> nn.Module:
        return tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA))

    folder, _ = old(Case(llama, of_words, _replaced((now, before)), QV, {}), tmp_path)
    with pytest.raises(veneer.BindError, match="the model has no"):
        veneer.PeftModel.from_pretrained(build(llama), folder)


def test_feedforward_modules_are_read_under_their_old_names(tmp_path: Path) -> None:
    names = {"target_modules": ["v_proj", "fc2"], "feedforward_modules": ["fc2"]}
    before = {"target_modules": ["value", "output.dense"], "feedforward_modules": ["output.dense"]}
    config = veneer.IA3Config(**names, init_ia3_weights=False)
    model = veneer.get_peft_model(build(vit), config, seed=1).eval()
    enlarge(model, "default")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    renamed = {PREFIX + _replaced(*VIT)(key.removeprefix(PREFIX)): tensor for key, tensor in tensors.items()}
    save_file({k: t for k, t in renamed.items() if "attention.output" not in k}, tmp_path / WEIGHTS, {"format": "pt"})
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**values, **before}))
    loaded = veneer.PeftModel.from_pretrained(build(vit), tmp_path)
    assert gap(answer(loaded, CASES["vit"]), answer(model, CASES["vit"])) < CLOSE


# -- experts -----------------------------------------------------------------------------------------------

SIZES = {**TEXT, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def moe() -> nn.Module:
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, **experts))


PATTERNS: dict[str, dict[str, Any]] = {
    "another alpha": {"alpha_pattern": {r"experts\.2\.w1": 60}},
    "a larger rank": {"rank_pattern": {r"experts\.0\.w[12]": 8}},
    "a smaller rank": {"rank_pattern": {r"experts\.2\.w3": 2}},
    "both, of one block": {
        "rank_pattern": {r"layers\.1\.block_sparse_moe\.experts\.1\.w2": 3},
        "alpha_pattern": {r"layers\.1\.block_sparse_moe\.experts\.1\.w2": 11, "w3": 5},
    },
    "no scale at all": {"alpha_pattern": {r"experts\.1\.w1": 0}},
    "with rslora": {"rank_pattern": {r"experts\.0\.w1": 8}, "use_rslora": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PATTERNS)
def test_each_expert_has_its_own_rank_and_scale(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    options = PATTERNS[name]
    generator, by_hand, tensors = torch.Generator().manual_seed(1), build(moe), dict[str, Tensor]()
    for index, layer in enumerate(by_hand.model.layers):
        for expert in range(3):
            for role in ("w1", "w2", "w3"):
                module = f"model.layers.{index}.block_sparse_moe.experts.{expert}.{role}"
                r, alpha = (
                    next(
                        (v for k, v in options.get(f"{what}_pattern", {}).items() if re.search(k + "$", module)), usual
                    )
                    for what, usual in (("rank", 4), ("alpha", 8))
                )
                out, inner = (16, 24) if role == "w2" else (24, 16)
                down = (torch.randn(r, inner, generator=generator) * 0.3).to(dtype)
                up = (torch.randn(out, r, generator=generator) * 0.3).to(dtype)
                tensors |= {f"{PREFIX}{module}.lora_A.weight": down, f"{PREFIX}{module}.lora_B.weight": up}
                stack = layer.mlp.experts.down_proj if role == "w2" else layer.mlp.experts.gate_up_proj
                start = 24 if role == "w3" else 0
                scale = alpha / (r**0.5 if options.get("use_rslora") else r)
                stack.data[expert, start : start + out] += scale * up.float() @ down.float()
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["w1", "w2", "w3"], **options}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    case = Case(moe, of_words, str, {}, {})
    expected = answer(by_hand, case)
    model = veneer.PeftModel.from_pretrained(build(moe), tmp_path)
    assert gap(answer(model, case), expected) < CLOSE
    model.save_pretrained(tmp_path / "now")
    assert gap(answer(veneer.PeftModel.from_pretrained(build(moe), tmp_path / "now"), case), expected) < CLOSE
    build(moe).save_pretrained(tmp_path / "base")
    veneer.merge(tmp_path, tmp_path / "base", out=tmp_path / "merged")
    assert gap(answer(tf.MixtralForCausalLM.from_pretrained(tmp_path / "merged").eval(), case), expected) < CLOSE


@pytest.mark.parametrize(
    "shape", [{"lora_A": (8, 16), "lora_B": (24, 8)}, {"lora_A": (4, 12), "lora_B": (24, 4)}, {"lora_B": (20, 4)}]
)
def test_an_experts_tensor_of_another_shape_is_refused(shape: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    """Its rank is not the config's, or it is of another base."""
    sizes = {"lora_A": (4, 16), "lora_B": (24, 4), **shape}
    tensors = {
        f"{PREFIX}model.layers.{index}.block_sparse_moe.experts.{expert}.w1.{leaf}.weight": torch.ones(size)
        for index in range(2)
        for expert in range(3)
        for leaf, size in sizes.items()
    }
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["w1"]}))
    with pytest.raises(veneer.BindError, match=r"experts\.0\.w1"):
        veneer.PeftModel.from_pretrained(build(moe), tmp_path)
