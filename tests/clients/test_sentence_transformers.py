"""Adapters of encoders in sentence-transformers: added, loaded, trained, saved with the encoder and loaded with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses

from tests.clients.world import SENTENCES, VOCAB, save_tokenizer, started

AsRecorded = Callable[[Any], None]
HOW = {
    **{"max_steps": 3, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, "disable_tqdm": True},
    **{"logging_steps": 1, "save_steps": 3, "seed": 0, "learning_rate": 1e-2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer."""
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    tf.BertModel(tf.BertConfig(vocab_size=VOCAB, pad_token_id=0, initializer_range=0.2, **sizes)).save_pretrained(path)
    save_tokenizer(path)
    return path


def config(**options: Any) -> Any:
    chosen = {"task_type": "FEATURE_EXTRACTION", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
    return peft.LoraConfig(**{**chosen, **options})


def encoder(path: Path) -> Any:
    return SentenceTransformer(str(path), device="cpu")


def drawn(model: Any, seed: int = 5) -> Any:
    """Give the tensors of a model's LoRAs values that do not depend on who made them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def vectors(model: Any) -> list[float]:
    return [float(vector[0]) for vector in model.encode(SENTENCES[:4])]


def test_add_save_and_load(folder: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    model = encoder(folder)
    figures: dict[str, Any] = {"base": vectors(model)}
    model.add_adapter(config())
    drawn(model)
    figures["adapter"] = [vectors(model), model.active_adapters()]
    figures["tensors"] = sorted(model.get_adapter_state_dict("default"))
    model.save_pretrained(str(tmp_path / "saved"))
    figures["files"] = sorted(path.name for path in (tmp_path / "saved").iterdir())
    figures["loaded"] = vectors(encoder(tmp_path / "saved"))
    model.disable_adapters()
    figures["disabled"] = vectors(model)
    model.enable_adapters()
    model.add_adapter(config(r=2), "other")
    model.set_adapter("default")
    figures["chosen"] = [vectors(model), model.active_adapters()]
    model.delete_adapter("default")
    figures["deleted"] = [vectors(model), model.active_adapters()]
    as_recorded(figures)


def test_load_an_adapter(folder: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    wrapped = peft.get_peft_model(tf.AutoModel.from_pretrained(folder), config())
    drawn(wrapped).save_pretrained(tmp_path)
    model = encoder(folder)
    model.load_adapter(str(tmp_path))
    figures: dict[str, Any] = {"loaded": [vectors(model), model.active_adapters()]}
    model = encoder(folder)
    model[0].auto_model = peft.PeftModel.from_pretrained(model[0].auto_model, tmp_path)
    figures["wrapped"] = vectors(model)
    alone = peft.AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path)
    prompt = tf.AutoTokenizer.from_pretrained(folder)(SENTENCES[0], return_tensors="pt")
    figures["alone"] = float(alone(**prompt).last_hidden_state.abs().sum())
    as_recorded(figures)


@pytest.mark.parametrize("wrapped", [False, True])
def test_train(wrapped: bool, folder: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    model = encoder(folder)
    if wrapped:
        model[0].auto_model = peft.get_peft_model(model[0].auto_model, config())
    else:
        model.add_adapter(config())
    started(model)
    pairs = Dataset.from_dict({"anchor": SENTENCES[:8], "positive": SENTENCES[4:]})
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(str(tmp_path), **HOW),
        train_dataset=pairs,
        loss=losses.MultipleNegativesRankingLoss(model),
    )
    model[0].auto_model.config.hidden_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train()
    figures = {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}
    figures["vectors"] = vectors(model)
    if not wrapped:
        saved = tmp_path / "checkpoint-3"
        figures["files"] = sorted(path.name for path in saved.iterdir() if path.suffix in (".json", ".safetensors"))
        assert vectors(encoder(saved)) == pytest.approx(vectors(model), abs=1e-5)
    as_recorded(figures)


def test_a_cross_encoder(folder: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    torch.manual_seed(0)
    model = CrossEncoder(str(folder), device="cpu", num_labels=1)
    pairs = [(SENTENCES[i], SENTENCES[i + 1]) for i in range(3)]
    figures = {"base": [float(score) for score in model.predict(pairs)]}
    model.add_adapter(config(task_type="SEQ_CLS", modules_to_save=["classifier"]))
    drawn(model)
    figures["adapter"] = [float(score) for score in model.predict(pairs)]
    model.save_pretrained(str(tmp_path / "saved"))
    figures["files"] = sorted(path.name for path in (tmp_path / "saved").iterdir() if "adapter" in path.name)
    as_recorded(figures)
