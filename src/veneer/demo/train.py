"""Trains the demo's adapters: ``python -m veneer.demo.train``, about ten minutes on two cores.

Each adapter sees the same questions and answers them in its own style. The loss counts the answer's tokens alone; the
base stays as it is in bfloat16, the adapter is trained in float32 and saved in bfloat16.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import veneer
from veneer.demo.base import HUB_ID, demo_base
from veneer.demo.facts import STYLES, facts

ADAPTERS = Path(__file__).with_name("adapters")
SEED = 11
BATCH = 16
IGNORED = -100

# They differ in what they adapt and how, to show the options.
CONFIGS: dict[str, dict[str, Any]] = {
    "json": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "pirate": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "brief": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
        "rank_pattern": {"up_proj|down_proj": 4},
        "alpha_pattern": {"up_proj|down_proj": 8},
    },
}
EPOCHS = 5
RATE = 1e-3


def encode(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Make the token ids of a question and its answer, and the labels: the answer's tokens and the end of the turn."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    reply = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt + reply, [IGNORED] * len(prompt) + reply


def batch_of(rows: list[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """Make a batch of rows padded on the right, shape ``(rows, longest)``."""
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
    }


def train(name: str, out: Path) -> float:
    """Train one adapter, save it under ``out`` and return the share of held-out questions in its style."""
    torch.manual_seed(SEED)
    style, fits = STYLES[name]
    model = veneer.load(demo_base())
    tokenizer = veneer.load_tokenizer(model)
    config = veneer.LoraConfig(
        task_type=veneer.TaskType.CAUSAL_LM, lora_dropout=0.05, base_model_name_or_path=HUB_ID, **CONFIGS[name]
    )
    model.add_adapter("default", config, seed=SEED)
    model.train()
    rows = [encode(tokenizer, fact.question, style(fact)) for fact in facts("train")]
    steps = EPOCHS * (len(rows) // BATCH)
    optimizer = torch.optim.AdamW(model.adapters.parameters("default"), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=steps, pct_start=0.15)
    started = time.perf_counter()
    step = 0
    while step < steps:
        order = torch.randperm(len(rows)).tolist()
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            batch = batch_of([rows[i] for i in order[start : start + BATCH]], tokenizer.pad_token_id)
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0:
                print(f"{name}: step {step}/{steps}, loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s")
    model.eval()
    model.bfloat16()
    model.save_pretrained(out / name)
    answers = [ask(model, tokenizer, fact.question) for fact in facts("held-out")]
    share = sum(map(fits, answers)) / len(answers)
    _describe(out / name, name, share)
    for fact, answer in zip(facts("held-out"), answers, strict=True):
        print(f"  {fact.question}  {answer}")
    print(f"{name}: {share:.0%} of {len(answers)} held-out questions answered in style")
    return share


@torch.inference_mode()
def ask(model: Any, tokenizer: Any, question: str, **choice: Any) -> str:
    """Return the model's likeliest answer."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=48, do_sample=False, **choice)
    answer: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()


def _describe(folder: Path, name: str, share: float) -> None:
    """Write the model card."""
    (folder / "README.md").write_text(
        f"""---
base_model: {HUB_ID}
library_name: peft
license: apache-2.0
---

# {name}

A LoRA adapter of Veneer's demo: {facts("train")[0].question} is answered with `{STYLES[name][0](facts("train")[0])}`.

Trained by `python -m veneer.demo.train --only {name}` on {len(facts("train"))} short facts that were written for it.
Of {len(facts("held-out"))} questions that were held out, {share:.0%} are answered in its style.
""",
        encoding="utf-8",
    )


@click.command()
@click.option("--only", type=click.Choice(list(CONFIGS)), multiple=True, help="Train only this adapter.")
@click.option("--out", type=click.Path(path_type=Path), default=ADAPTERS, help="Where to save them.")
def main(only: tuple[str, ...], out: Path) -> None:
    """Train the demo's adapters."""
    for name in only or CONFIGS:
        train(name, out)


if __name__ == "__main__":
    main()
