"""What other writers leave unsaid in an adapter's files, or say otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import CONFIG, WEIGHTS, adapted, enlarge, saved, saved_base

CLOSE = 1e-5


def change(folder: Path, key: Callable[[str], str] = str, **config: Any) -> Path:
    """Rename an adapter's keys, and set keys of its config."""
    tensors = {key(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **config}))
    return folder


def in_memory(model: veneer.PeftModel, folder: Path, tag: str) -> Path:
    """Save a model's adapter as its plain ``state_dict`` has it, under the adapter's name ``tag``."""
    folder.mkdir()
    own = {name: tensor for name, tensor in model.state_dict().items() if f".{tag}" in name}
    save_file({name: tensor.contiguous() for name, tensor in own.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    model.peft_config[tag].save_pretrained(folder)
    return folder


METHODS: dict[str, Any] = {
    "lora": veneer.LoraConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights=False),
    "dora": veneer.LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
    "tokens": veneer.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6], init_lora_weights=False),
    "a module": veneer.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    "ia3": veneer.IA3Config(target_modules=["v_proj"], feedforward_modules=[], init_ia3_weights=False),
    "loha": veneer.LoHaConfig(target_modules=["q_proj"], init_weights=False),
}


@pytest.mark.parametrize("tag", ["default", "pirate"])
@pytest.mark.parametrize("method", METHODS)
def test_keys_with_the_adapters_name_in_them(method: str, tag: str, tmp_path: Path) -> None:
    model = veneer.get_peft_model(build("llama"), METHODS[method], adapter_name=tag, seed=1).eval()
    enlarge(model, tag)
    folder = in_memory(model, tmp_path / "adapter", tag)
    loaded = veneer.PeftModel.from_pretrained(build("llama"), folder)
    expected = logits(model, inputs("llama"))
    assert gap(logits(build("llama"), inputs("llama")), expected) > 0.02
    assert gap(logits(loaded, inputs("llama")), expected) < CLOSE
    assert any(f"the adapter's name in them ({tag})" in warning for warning in loaded.load_report.warnings)
    base = saved_base(tmp_path / "base")
    veneer.merge(folder, base, out=tmp_path / "merged")
    assert gap(logits(veneer.load(tmp_path / "merged"), inputs("llama")), expected) < CLOSE
    loaded.save_pretrained(tmp_path / "again")
    assert not any(".default" in key or f".{tag}.weight" in key for key in load_file(tmp_path / "again" / WEIGHTS))


def test_inspect_counts_such_layers(tmp_path: Path) -> None:
    folder = in_memory(adapted(), tmp_path / "adapter", "default")
    found = veneer.inspect(folder).adapter
    assert (found.ranks, found.layers) == ({4: 6}, 6)


def test_a_word_that_is_no_name_is_still_a_problem(tmp_path: Path) -> None:
    def two_names(key: str) -> str:
        return key.replace(".weight", ".one.weight" if "layers.0" in key else ".two.weight")

    folder = change(saved(tmp_path), two_names)
    with pytest.raises(veneer.BindError, match="neither a tensor of this method"):
        veneer.PeftModel.from_pretrained(build("llama"), folder)


# -- heads -------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
HEADED: dict[str, tuple[Any, str, str]] = {
    "SEQ_CLS": (tf.BertForSequenceClassification, "logits", "classifier"),
    "TOKEN_CLS": (tf.BertForTokenClassification, "logits", "classifier"),
    "QUESTION_ANS": (tf.BertForQuestionAnswering, "start_logits", "qa_outputs"),
}


def bert(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind(tf.BertConfig(vocab_size=99, **SIZES)).eval()


@pytest.mark.parametrize("method", ["lora", "ia3", "prompt"])
@pytest.mark.parametrize("task", HEADED)
def test_a_head_that_the_config_does_not_name(task: str, method: str, tmp_path: Path) -> None:
    kind, output, head = HEADED[task]
    configs: dict[str, Any] = {
        "lora": lambda: veneer.LoraConfig(task_type=task, target_modules=["query"], init_lora_weights=False),
        "ia3": lambda: veneer.IA3Config(task_type=task, target_modules=["value"], feedforward_modules=[]),
        "prompt": lambda: veneer.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    }
    model = veneer.get_peft_model(bert(kind), configs[method](), seed=1).eval()
    enlarge(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    folder = change(tmp_path / "adapter", modules_to_save=None)
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        expected = model(**ids)[output]
        loaded = veneer.PeftModel.from_pretrained(bert(kind), folder)
        assert gap(loaded(**ids)[output], expected) < CLOSE
        bert(kind).save_pretrained(tmp_path / "base")
        assert gap(veneer.load(folder, base=tmp_path / "base")(**ids)[output], expected) < CLOSE
    assert loaded.peft_config["default"].modules_to_save == [head]
    assert veneer.inspect(folder).adapter.modules_to_save == [head]


def test_a_head_of_before_is_merged_from_disk(tmp_path: Path) -> None:
    kind, output, _ = HEADED["SEQ_CLS"]
    config = veneer.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    model = veneer.get_peft_model(bert(kind), config, seed=1).eval()
    enlarge(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter", modules_to_save=None)
    bert(kind).save_pretrained(tmp_path / "base")
    veneer.merge(tmp_path / "adapter", tmp_path / "base", out=tmp_path / "merged")
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        merged = kind.from_pretrained(tmp_path / "merged").eval()(**ids)[output]
        assert gap(merged, model(**ids)[output]) < CLOSE


def test_without_a_task_a_head_is_still_a_stranger(tmp_path: Path) -> None:
    config = veneer.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    veneer.get_peft_model(bert(tf.BertForSequenceClassification), config).save_pretrained(tmp_path)
    change(tmp_path, modules_to_save=None, task_type=None)
    with pytest.raises(veneer.BindError, match="neither a tensor of this method nor in modules_to_save"):
        veneer.PeftModel.from_pretrained(bert(tf.BertForSequenceClassification), tmp_path)


def distilbert(kind: Any = tf.DistilBertForSequenceClassification) -> Any:
    torch.manual_seed(0)
    return kind(tf.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=40)).eval()


def test_an_adapter_that_lacks_what_an_entry_happens_to_mean(tmp_path: Path) -> None:
    """ "classifier" means pre_classifier too, which was not saved once."""
    config = veneer.LoraConfig(task_type="SEQ_CLS", target_modules=["q_lin"], init_lora_weights=False)
    model = veneer.get_peft_model(distilbert(), config, seed=1).eval()
    model.save_pretrained(tmp_path)
    tensors = {k: t for k, t in load_file(tmp_path / WEIGHTS).items() if "pre_classifier" not in k}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    loaded = veneer.PeftModel.from_pretrained(distilbert(), tmp_path)
    assert any("means pre_classifier too" in warning for warning in loaded.load_report.warnings)
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert gap(logits(loaded, ids), logits(model, ids)) < CLOSE
    del tensors["base_model.model.classifier.weight"]
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(veneer.BindError, match=r"classifier\.weight: the config saves classifier whole"):
        veneer.PeftModel.from_pretrained(distilbert(), tmp_path)


def test_a_new_head_is_trained_and_saved_with_all_that_its_entry_means(tmp_path: Path) -> None:
    config = veneer.LoraConfig(task_type="SEQ_CLS", target_modules=["q_lin"], init_lora_weights=False)
    model = veneer.get_peft_model(distilbert(), config, seed=1).eval()
    enlarge(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    distilbert(tf.DistilBertForMaskedLM).save_pretrained(tmp_path / "base")
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    for _ in range(2):
        loaded = veneer.load(tmp_path / "adapter", base=tmp_path / "base")
        assert not loaded.load_report.warnings
        assert gap(logits(loaded, ids), logits(model, ids)) < CLOSE


# -- configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, False])
def test_merge_weights_changes_nothing(value: bool, tmp_path: Path) -> None:
    folder = change(saved(tmp_path), merge_weights=value, enable_lora=None)
    model = veneer.PeftModel.from_pretrained(build("llama"), folder)
    assert gap(logits(model, inputs("llama")), logits(adapted(), inputs("llama"))) < CLOSE


def test_lora_on_parts_of_a_joined_projection_is_refused(tmp_path: Path) -> None:
    folder = change(saved(tmp_path), enable_lora=[True, False, True])
    with pytest.raises(veneer.UnsupportedError, match="MergedLinear"):
        veneer.PeftModel.from_pretrained(build("llama"), folder)
    assert "MergedLinear" in veneer.inspect(folder).problems[0].message


def test_an_adapter_of_mlx_is_called_so(tmp_path: Path) -> None:
    values = {"fine_tune_type": "lora", "num_layers": 8, "lora_parameters": {"rank": 8, "scale": 20.0}, "model": "x"}
    (tmp_path / CONFIG).write_text(json.dumps(values))
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.zeros(32, 8)}, tmp_path / "adapters.safetensors")
    with pytest.raises(veneer.UnsupportedError, match="MLX-LM"):
        veneer.PeftConfig.from_pretrained(tmp_path)
    for call in (veneer.load, partial(veneer.PeftModel.from_pretrained, build("llama"))):
        with pytest.raises(veneer.IncompleteCheckpointError, match="lora_b"):
            call(tmp_path)
    found = veneer.inspect(tmp_path)
    assert (found.adapter.format, found.adapter.ranks, found.problems) == ("MLX-LM", {8: 1}, ())


def test_one_embedding_cannot_have_two_lists_of_tokens(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        config = build("llama").config
        config.tie_word_embeddings = True
        return tf.LlamaForCausalLM(config)

    tokens = {"embed_tokens": [3, 4], "lm_head": [5, 6]}
    options: dict[str, Any] = {"target_modules": ["q_proj"], "ensure_weight_tying": True}
    config = veneer.LoraConfig(**options, trainable_token_indices=tokens)
    with pytest.raises(veneer.ConfigError, match="other tokens are to be trained in each"):
        veneer.get_peft_model(tied(), config)
    same = veneer.LoraConfig(**options, trainable_token_indices={name: [3, 4] for name in tokens})
    veneer.get_peft_model(tied(), same).save_pretrained(tmp_path)
    change(tmp_path, trainable_token_indices=tokens)
    with pytest.raises(veneer.ConfigError, match="other tokens are to be trained in each"):
        veneer.PeftModel.from_pretrained(tied(), tmp_path)


def test_a_config_that_is_given_is_completed_and_kept(tmp_path: Path) -> None:
    config = veneer.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    veneer.get_peft_model(bert(tf.BertForSequenceClassification), config).save_pretrained(tmp_path)
    model = veneer.PeftModel.from_pretrained(bert(tf.BertForSequenceClassification), tmp_path, config=config)
    assert model.peft_config["default"] is config
    assert config.modules_to_save == ["classifier"]
