"""transformers' Trainer on adapted models: checkpoints, resuming, the best model, other tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from datasets import Dataset

from tests.clients.world import SENTENCES, VOCAB, base_model, last_logits, lora, started, weight_sum

AsRecorded = Callable[[Any], None]


def adapted(base: Path, **options: Any) -> Any:
    return started(peft.get_peft_model(base_model(base), lora(**options)))


def trainer(model: Any, base: Path, out: Path, **options: Any) -> tf.Trainer:
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    rows = Dataset.from_list([dict(tokenizer(text, return_token_type_ids=False)) for text in SENTENCES])
    arguments = {
        **{
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "logging_steps": 1,
            "save_steps": 2,
            "learning_rate": 1e-2,
        },
        **{"eval_strategy": "steps", "eval_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True},
        **{"seed": 0, "data_seed": 0, **options},
    }
    return tf.Trainer(
        model=model,
        args=tf.TrainingArguments(str(out), **arguments),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        data_collator=tf.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )


def losses(of: tf.Trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in of.state.log_history if name in entry]


def files(folder: Path) -> list[str]:
    """Return the files of a folder, without the set's own, which peft has not."""
    return sorted(path.name for path in folder.iterdir() if path.name != "adapter_set.json")


def test_a_checkpoint_is_resumed(base: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    whole = trainer(adapted(base), base, tmp_path / "whole")
    whole.train()
    trainer(adapted(base), base, tmp_path / "parts", max_steps=2, lr_scheduler_type="constant").train()
    model = adapted(base)
    resumed = trainer(model, base, tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    gap = max(
        (there - here).abs().max().item()
        for there, here in zip(whole.model.state_dict().values(), model.state_dict().values(), strict=True)
    )
    as_recorded(
        {
            "files": files(tmp_path / "whole" / "checkpoint-2"),
            "losses": losses(whole),
            "eval": losses(whole, "eval_loss"),
            "resumed": losses(resumed),
            "step": resumed.state.global_step,
            "gap": gap,
        }
    )


def test_the_best_model_is_loaded_at_the_end(base: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    """The worst loss counts as the best here, so that it is not the last checkpoint that is loaded."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    own = trainer(adapted(base), base, tmp_path, **best)
    own.train()
    assert own.state.best_model_checkpoint is not None
    as_recorded(
        {
            "best": Path(own.state.best_model_checkpoint).name,
            "metric": own.state.best_metric,
            "now": own.evaluate()["eval_loss"],
        }
    )


@pytest.mark.parametrize("best", [False, True], ids=["resumed", "best"])
def test_two_adapters(best: bool, base: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    def two() -> Any:
        model = peft.get_peft_model(base_model(base), lora(), adapter_name="a")
        model.add_adapter("b", lora(target_modules=["up_proj"]))
        model.set_adapter("a")
        return started(model)

    how = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    first = trainer(two(), base, tmp_path, **(how if best else {}))
    first.train()
    figures = {"losses": losses(first), "files": files(tmp_path / "checkpoint-2")}
    if best:
        figures["now"] = first.evaluate()["eval_loss"]
    else:
        model = two()
        second = trainer(model, base, tmp_path, max_steps=6)
        second.train(resume_from_checkpoint=True)
        figures |= {"resumed": losses(second), "b": weight_sum(model, "lora_B.b"), "active": model.active_adapters}
    as_recorded(figures)


@pytest.mark.parametrize("option", ["gradient_checkpointing", "bf16", "torch_compile", "auto_find_batch_size"])
def test_options(option: str, base: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    more = {"torch_compile_backend": "aot_eager"} if option == "torch_compile" else {}
    own = trainer(adapted(base), base, tmp_path, max_steps=2, **{option: True}, **more)
    own.train()
    rounded = 2 if option == "bf16" else 4
    as_recorded({"losses": [round(loss, rounded) for loss in losses(own)]})


def test_saving_predicting_and_metrics(base: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    own = trainer(adapted(base), base, tmp_path / "run", max_steps=2, save_strategy="no")
    own.compute_metrics = lambda prediction: {"rows": float(prediction.predictions.shape[0])}
    own.train()
    own.save_model(str(tmp_path / "final"))
    own.create_model_card()
    assert own.eval_dataset is not None
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    card = (tmp_path / "run" / "README.md").read_text().splitlines()
    as_recorded(
        {
            "labels": own.label_names,
            "rows": own.evaluate()["eval_rows"],
            "predictions": list(own.predict(own.eval_dataset).predictions.shape),
            "files": files(tmp_path / "final"),
            "loaded": last_logits(loaded, base),
            "library": [line for line in card if line.startswith("library_name")],
        }
    )


def test_a_model_with_an_adapter_and_no_wrapper(base: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    model = base_model(base)
    model.add_adapter(lora())
    own = trainer(started(model), base, tmp_path)
    own.train()
    again = base_model(base)
    again.load_adapter(tmp_path / "checkpoint-4")
    as_recorded(
        {
            "losses": losses(own),
            "files": files(tmp_path / "checkpoint-2"),
            "loaded": last_logits(again, base),
        }
    )


def test_sequence_classification(base: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    bert = tf.BertForSequenceClassification(config)
    model = started(peft.get_peft_model(bert, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])))
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    rows = Dataset.from_list(
        [{**tokenizer(t, return_token_type_ids=False), "label": i % 3} for i, t in enumerate(SENTENCES)]
    )
    own = tf.Trainer(
        model=model.eval(),
        args=tf.TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            report_to="none",
            use_cpu=True,
            learning_rate=1e-2,
            disable_tqdm=True,
            seed=0,
            save_steps=2,
            logging_steps=1,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=tf.DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"right": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    own.train()
    metrics = own.evaluate()
    as_recorded({"files": files(tmp_path / "checkpoint-2"), "metrics": sorted(metrics), "labels": own.label_names})


def test_seq2seq(base: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
        dropout_rate=0.0,
    )
    model = peft.get_peft_model(
        tf.T5ForConditionalGeneration(config), peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    )
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [8, 9]}] * 6)
    own = tf.Seq2SeqTrainer(
        model=started(model),
        args=tf.Seq2SeqTrainingArguments(
            str(tmp_path),
            max_steps=2,
            predict_with_generate=True,
            generation_max_length=5,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=1,
            learning_rate=1e-2,
            seed=0,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=tf.DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
    )
    own.train()
    as_recorded({"losses": losses(own), "predictions": own.predict(rows).predictions.tolist()})
