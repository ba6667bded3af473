"""Adapters as peft writes them for models whose heads, layers and names are out of the ordinary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from tests.models import BLOCKS, LLAMA, TEXT, gap
from tests.oracle.peer import VISIBLE, WEIGHTS, scramble

pytestmark = [
    pytest.mark.oracle,
    # What peft says when it saves such a layer, and of keys that another version of it wrote.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Unexpected keyword arguments"),
]

CLOSE = 1e-5
CONFIG = "adapter_config.json"
IDS = {"input_ids": torch.tensor([[5, 6, 7, 8]])}


def made(make: Callable[[], Any]) -> Any:
    """A model, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def distilbert() -> nn.Module:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40}
    return tf.DistilBertForSequenceClassification(tf.DistilBertConfig(vocab_size=99, **sizes))


def bert() -> nn.Module:
    return tf.BertForSequenceClassification(tf.BertConfig(vocab_size=99, **BLOCKS, intermediate_size=40))


def bert_lm() -> nn.Module:
    return tf.BertForMaskedLM(tf.BertConfig(vocab_size=99, **BLOCKS, intermediate_size=40))


def gpt2() -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return tf.GPT2ForSequenceClassification(tf.GPT2Config(**TEXT, **sizes))


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA))


def phi() -> nn.Module:
    return tf.PhiForCausalLM(tf.PhiConfig(**TEXT, **BLOCKS, intermediate_size=48, tie_word_embeddings=False))


def siglip() -> nn.Module:
    return tf.SiglipVisionModel(tf.SiglipVisionConfig(**BLOCKS, intermediate_size=40, image_size=16, patch_size=8))


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))}


@torch.no_grad()
def answer(model: Any, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    found: Tensor = output.logits if "logits" in output else output.pooler_output
    return found


def saved_by_peft(
    make: Callable[[], Any], config: Any, folder: Path, batch: dict[str, Tensor], idle: str = "-"
) -> tuple[Path, Tensor]:
    """An adapter that peft made, and its answers; tensors whose name has ``idle`` stay as they begin."""
    theirs = peft.get_peft_model(made(make), config).eval()
    kept = {name: p.detach().clone() for name, p in theirs.named_parameters() if idle in name}
    scramble(theirs)
    for name, parameter in theirs.named_parameters():
        if name in kept:
            parameter.data.copy_(kept[name])
    theirs.save_pretrained(folder)
    expected = answer(theirs, batch)
    assert gap(answer(made(make), batch), expected) > VISIBLE
    return folder, expected


def check_everywhere(make: Callable[[], Any], folder: Path, batch: dict[str, Tensor], expected: Tensor) -> Any:
    """Loaded, and merged from disk, it answers as peft does; saved again peft reads it alike."""
    again = peft.PeftModel.from_pretrained(made(make), folder).eval()
    assert gap(answer(again, batch), expected) < CLOSE
    model = veneer.PeftModel.from_pretrained(made(make), folder)
    assert gap(answer(model, batch), expected) < CLOSE
    base = folder.parent / "base"
    made(make).save_pretrained(base)
    assert gap(answer(veneer.load(folder, base=base), batch), expected) < CLOSE
    veneer.merge(folder, base, out=folder.parent / "merged")
    assert gap(answer(type(made(make)).from_pretrained(folder.parent / "merged").eval(), batch), expected) < CLOSE
    model.save_pretrained(folder.parent / "again")
    theirs = peft.PeftModel.from_pretrained(made(make), folder.parent / "again").eval()
    assert gap(answer(theirs, batch), expected) < CLOSE
    return model


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, **options})


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (distilbert, {"task_type": "SEQ_CLS", "target_modules": ["q_lin"]}),
        (llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
        (llama, {"target_modules": ["q_proj"], "modules_to_save": ["_layernorm", "head"]}),
        (llama, {"target_modules": ["q_proj"], "modules_to_save": ["tokens"]}),
    ],
)
def test_an_entry_means_whatever_ends_so(make: Callable[[], Any], options: dict[str, Any], tmp_path: Path) -> None:
    folder, expected = saved_by_peft(make, lora(**options), tmp_path / "adapter", IDS)
    check_everywhere(make, folder, IDS, expected)
    # And a new one trains what peft trains.
    ours = veneer.get_peft_model(made(make), veneer.LoraConfig(r=4, **options))
    ours.save_pretrained(tmp_path / "ours")
    assert load_file(tmp_path / "ours" / WEIGHTS).keys() == load_file(folder / WEIGHTS).keys()


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (bert, lora(task_type="SEQ_CLS", target_modules=["query"])),
        (gpt2, lora(task_type="SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True)),
        (bert, peft.IA3Config(task_type="SEQ_CLS", target_modules=["value"], feedforward_modules=[])),
    ],
)
def test_a_head_that_the_config_does_not_name(make: Callable[[], Any], config: Any, tmp_path: Path) -> None:
    """As peft wrote it up to 0.10."""
    folder, expected = saved_by_peft(make, config, tmp_path / "adapter", IDS)
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, "modules_to_save": None}))
    check_everywhere(make, folder, IDS, expected)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "out_proj"]])
def test_a_layer_that_is_never_called(targets: Any, tmp_path: Path) -> None:
    config = lora(target_modules=targets)
    folder, expected = saved_by_peft(
        siglip, config, tmp_path / "adapter", pixels(), idle=".head.attention.out_proj.lora_B"
    )
    model = check_everywhere(siglip, folder, pixels(), expected)
    (note,) = model.load_report.warnings
    assert "never called" in note
    assert not any("head.attention" in key for key in load_file(tmp_path / "again" / WEIGHTS))


def test_a_layer_that_is_never_called_does_not_act_whatever_it_holds(tmp_path: Path) -> None:
    folder, expected = saved_by_peft(
        siglip, lora(target_modules=["q_proj", "out_proj"]), tmp_path / "adapter", pixels()
    )
    assert gap(answer(veneer.PeftModel.from_pretrained(made(siglip), folder), pixels()), expected) < CLOSE


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (phi, ["q_proj", "lm_head"]),
        (phi, ["embed_tokens"]),
        (bert_lm, ["query", "decoder"]),
        (bert_lm, ["word_embeddings"]),
    ],
)
def test_an_output_layer_with_a_bias(make: Callable[[], Any], targets: list[str], tmp_path: Path) -> None:
    folder, expected = saved_by_peft(make, lora(target_modules=targets), tmp_path / "adapter", IDS)
    check_everywhere(make, folder, IDS, expected)


def test_another_bias_than_the_bases_is_used(tmp_path: Path) -> None:
    folder, before = saved_by_peft(phi, lora(target_modules=["lm_head"]), tmp_path / "adapter", IDS)
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.lm_head.base_layer.bias"] += 1.0
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    theirs = answer(peft.PeftModel.from_pretrained(made(phi), folder).eval(), IDS)
    assert gap(theirs, before) > VISIBLE
    check_everywhere(phi, folder, IDS, theirs)


def test_keys_with_the_adapters_name_in_them(tmp_path: Path) -> None:
    folder, expected = saved_by_peft(llama, lora(target_modules=["q_proj"]), tmp_path / "adapter", IDS)
    tensors = {key.replace(".weight", ".default.weight"): t for key, t in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    check_everywhere(llama, folder, IDS, expected)


def test_a_bias_beside_a_layer_that_has_none_is_a_problem(tmp_path: Path) -> None:
    folder, _ = saved_by_peft(llama, lora(target_modules=["lm_head"]), tmp_path / "adapter", IDS)
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.lm_head.base_layer.bias"] = torch.zeros(99)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(veneer.BindError, match=r"lm_head: base_layer\.bias is in the checkpoint, and this layer"):
        veneer.PeftModel.from_pretrained(made(llama), folder)
