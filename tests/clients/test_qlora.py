"""QLoRA by the usual script: a base packed by bitsandbytes, prepared for training, with Trainer or TRL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
import trl
from datasets import Dataset

from tests.clients.test_trainer import losses, trainer
from tests.clients.world import SENTENCES, base_model, last_logits, lora, started, tokens

AsRecorded = Callable[[Any], None]


def packed(base: Path) -> Any:
    quantization = tf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )
    return tf.AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, device_map="cpu")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_usual_script(checkpointing: bool, base: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    model = peft.prepare_model_for_kbit_training(packed(base), use_gradient_checkpointing=checkpointing)
    model = started(peft.get_peft_model(model, lora(target_modules="all-linear")))
    # No evaluation in between: bitsandbytes 0.50 gives wrong gradients after one, on processors with bfloat16 products.
    how = {"gradient_checkpointing": checkpointing, "optim": "adamw_torch", "eval_strategy": "no"}
    own = trainer(model, base, tmp_path / "run", **how)
    own.train()
    model.save_pretrained(tmp_path / "final")
    loaded = peft.PeftModel.from_pretrained(packed(base), tmp_path / "final")
    onto_plain = peft.PeftModel.from_pretrained(base_model(base), tmp_path / "final")
    as_recorded(
        {
            "losses": losses(own),
            "norms": sorted({str(p.dtype) for name, p in model.named_parameters() if "norm" in name}),
            "adapter": sorted({str(p.dtype) for name, p in model.named_parameters() if "lora" in name}),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            # In training mode, for the layout that inference takes on those processors rounds more.
            "loaded": last_logits(loaded.train(), base),
            "onto a plain base": last_logits(onto_plain, base),
        }
    )


def test_a_loop_without_preparing(base: Path, as_recorded: AsRecorded) -> None:
    model = started(peft.get_peft_model(packed(base), lora(target_modules="all-linear"))).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch, figures = tokens(base), []
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        figures.append(loss.item())
    as_recorded({"losses": figures})


def test_sft(base: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    own = trl.SFTTrainer(
        packed(base),
        args=trl.SFTConfig(
            str(tmp_path),
            max_length=32,
            max_steps=2,
            per_device_train_batch_size=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            bf16=False,
            learning_rate=1e-2,
            logging_steps=1,
            seed=0,
        ),
        train_dataset=Dataset.from_list([{"text": text} for text in SENTENCES]),
        processing_class=tf.AutoTokenizer.from_pretrained(base),
        peft_config=lora(),
    )
    started(own.model)
    own.train()
    as_recorded({"losses": losses(own), "class": type(own.model).__name__})
