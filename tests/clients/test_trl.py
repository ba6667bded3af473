"""TRL's trainers, with ``peft_config=`` and with a model that is adapted already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers as tf
import trl
from datasets import Dataset

from tests.clients.world import SENTENCES, base_model, last_logits, lora, started, weight_sum

AsRecorded = Callable[[Any], None]
HOW = {
    **{"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True},
    **{"logging_steps": 1, "save_steps": 2, "seed": 0, "bf16": False, "gradient_checkpointing": False},
    **{"learning_rate": 1e-2},
}
WAYS = pytest.mark.parametrize("wrapped", [False, True], ids=["peft_config", "model"])


def model_and_config(base: Path, wrapped: bool) -> dict[str, Any]:
    """Return the arguments of a trainer that concern peft."""
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    if wrapped:
        return {"model": peft.get_peft_model(base_model(base), lora()), "processing_class": tokenizer}
    return {"model": base_model(base), "peft_config": lora(), "processing_class": tokenizer}


def texts() -> Dataset:
    return Dataset.from_list([{"text": text} for text in SENTENCES])


def preferences() -> Dataset:
    return Dataset.from_list([{"prompt": f"w{i} w2", "chosen": f"w{i + 1} w7", "rejected": "w3"} for i in range(8)])


def trained(own: Any, name: str = "loss") -> list[float]:
    """Train from a start that does not depend on who made the adapter, and return the losses."""
    started(own.model)
    own.train()
    return [entry[name] for entry in own.state.log_history if name in entry]


@WAYS
def test_sft(wrapped: bool, base: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    arguments = trl.SFTConfig(str(tmp_path), max_length=32, **HOW)
    own = trl.SFTTrainer(args=arguments, train_dataset=texts(), **model_and_config(base, wrapped))
    losses = trained(own)
    own.save_model(str(tmp_path / "final"))
    loaded = peft.PeftModel.from_pretrained(base_model(base), tmp_path / "final")
    as_recorded(
        {
            "class": type(own.model).__name__,
            "losses": losses,
            "files": sorted(path.name for path in (tmp_path / "final").iterdir()),
            "checkpoint": sorted(path.name for path in (tmp_path / "checkpoint-2").iterdir()),
            "loaded": last_logits(loaded, base),
        }
    )


def test_sft_of_a_path_with_conversations(base: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    turns = [
        {"messages": [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": f"w{i + 1}"}]}
        for i in range(8)
    ]
    arguments = trl.SFTConfig(str(tmp_path), max_length=32, model_init_kwargs={"dtype": "float32"}, **HOW)
    own = trl.SFTTrainer(str(base), arguments, train_dataset=Dataset.from_list(turns), peft_config=lora())
    as_recorded({"class": type(own.model).__name__, "losses": trained(own)})


def test_sft_with_packing(base: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    arguments = trl.SFTConfig(str(tmp_path), max_length=16, packing=True, **HOW)
    own = trl.SFTTrainer(args=arguments, train_dataset=texts(), **model_and_config(base, True))
    as_recorded({"losses": trained(own)})


def test_sft_is_resumed(base: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    def trainer(steps: int) -> Any:
        arguments = trl.SFTConfig(str(tmp_path), max_length=32, **{**HOW, "max_steps": steps})
        return trl.SFTTrainer(args=arguments, train_dataset=texts(), **model_and_config(base, True))

    trained(trainer(2))
    own = trainer(4)
    own.train(resume_from_checkpoint=True)
    losses = [entry["loss"] for entry in own.state.log_history if "loss" in entry]
    as_recorded({"step": own.state.global_step, "losses": losses, "weights": weight_sum(own.model)})


@WAYS
def test_dpo_takes_the_model_without_its_adapter_as_reference(
    wrapped: bool, base: Path, tmp_path: Path, as_recorded: AsRecorded
) -> None:
    arguments = trl.DPOConfig(str(tmp_path), max_length=32, **HOW)
    own = trl.DPOTrainer(args=arguments, train_dataset=preferences(), **model_and_config(base, wrapped))
    figures = {"losses": trained(own), "margins": trained_values(own, "rewards/margins")}
    as_recorded({**figures, "reference": own.ref_model is None, "adapters": [*own.model.peft_config]})


def trained_values(own: Any, name: str) -> list[float]:
    return [entry[name] for entry in own.state.log_history if name in entry]


def test_dpo_goes_on_from_an_adapter(base: Path, first: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    """The reference is a copy of the adapter, which TRL calls ``ref``."""
    model = peft.PeftModel.from_pretrained(base_model(base), first, is_trainable=True)
    own = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(str(tmp_path), max_length=32, **HOW),
        train_dataset=preferences(),
        processing_class=tf.AutoTokenizer.from_pretrained(base),
    )
    reference = weight_sum(own.model, "lora_B.ref")
    own.train()
    as_recorded(
        {
            "losses": trained_values(own, "loss"),
            "adapters": [*own.model.peft_config],
            "reference stays": weight_sum(own.model, "lora_B.ref") == reference,
            "reference": reference,
            "weights": weight_sum(own.model, "lora_B.default"),
        }
    )


@WAYS
def test_reward(wrapped: bool, base: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    plain = tf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="float32")
    plain.score.weight.data.fill_(0.1)
    config = lora(task_type="SEQ_CLS", modules_to_save=["score"])
    ways = {"model": peft.get_peft_model(plain, config)} if wrapped else {"model": plain, "peft_config": config}
    own = trl.RewardTrainer(
        args=trl.RewardConfig(str(tmp_path), max_length=32, **HOW),
        train_dataset=preferences(),
        processing_class=tf.AutoTokenizer.from_pretrained(base),
        **ways,
    )
    as_recorded({"losses": trained(own)})


@WAYS
def test_grpo(wrapped: bool, base: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    arguments = trl.GRPOConfig(str(tmp_path), num_generations=2, max_completion_length=4, beta=0.1, **HOW)
    own = trl.GRPOTrainer(
        reward_funcs=lambda completions, **_: [float(len(text) % 5) for text in completions],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w2"} for i in range(4)]),
        **model_and_config(base, wrapped),
    )
    figures = {"losses": trained(own), "kl": trained_values(own, "kl"), "rewards": trained_values(own, "reward")}
    as_recorded({**figures, "reference": own.ref_model is None, "class": type(own.model).__name__})
