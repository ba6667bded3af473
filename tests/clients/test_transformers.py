"""transformers' own use of peft: adapters loaded and made by models, pipelines, generation in many ways."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from tests.clients import conftest
from tests.clients.world import (
    answer,
    base_model,
    last_logits,
    save_adapter,
    save_expert_adapter,
    save_moe,
    started,
    tokens,
)

AsRecorded = Callable[[Any], None]


def test_a_model_comes_with_its_adapter(base: Path, first: Path, as_recorded: AsRecorded) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(first)
    as_recorded(
        {
            "class": type(model).__name__,
            "active": model.active_adapters(),
            "logits": last_logits(model, base),
            "answer": answer(model, base),
        }
    )


def test_pipelines(base: Path, first: Path, as_recorded: AsRecorded) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    how = {"max_new_tokens": 5, "do_sample": False}
    wrapped = peft.PeftModel.from_pretrained(base_model(base), first)
    tokenizer.save_pretrained(first)
    as_recorded(
        {
            "folder": tf.pipeline("text-generation", model=str(first))("w3 w14", **how)[0]["generated_text"],
            "model": tf.pipeline("text-generation", model=wrapped, tokenizer=tokenizer)("w3 w14", **how)[0],
            "batch": tf.pipeline("text-generation", model=wrapped, tokenizer=tokenizer, batch_size=2)(
                ["w3 w14", "w1 w5 w9"], **how
            ),
        }
    )


def test_adapters_of_a_plain_model(
    base: Path, first: Path, second: Path, tmp_path: Path, as_recorded: AsRecorded
) -> None:
    model = base_model(base)
    figures: dict[str, Any] = {"plain": last_logits(model, base)}

    def note(name: str) -> None:
        figures[name] = [model.active_adapters(), last_logits(model, base)]

    model.load_adapter(first)
    note("loaded")
    model.load_adapter(second, adapter_name="second")
    note("two")
    model.set_adapter("default")
    note("chosen")
    model.set_adapter(["default", "second"])
    note("both")
    model.disable_adapters()
    figures["disabled"] = last_logits(model, base)
    model.enable_adapters()
    note("enabled")
    figures["state"] = {k: list(v.shape) for k, v in model.get_adapter_state_dict("second").items()}
    model.set_adapter("second")
    model.save_pretrained(tmp_path)
    figures["files"] = sorted(path.name for path in tmp_path.iterdir())
    figures["again"] = last_logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path), base)
    model.delete_adapter("second")
    figures["left"] = [*model.peft_config]
    model.delete_adapter("default")
    figures["plain again"] = last_logits(model, base)
    as_recorded(figures)


def test_a_new_adapter_of_a_plain_model_is_trained(base: Path, as_recorded: AsRecorded) -> None:
    model = base_model(base)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    started(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    batch, losses = tokens(base), []
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    as_recorded({"tensors": len(trained), "losses": losses, "copy": last_logits(copy.deepcopy(model), base)})


def test_hotswap(base: Path, first: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    other = save_adapter(tmp_path / "other", base, seed=3)
    model = base_model(base)
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(first, adapter_name="x")
    before = last_logits(model, base)
    model.load_adapter(other, adapter_name="x")
    as_recorded({"before": before, "after": last_logits(model, base), "adapters": [*model.peft_config]})


def test_ways_to_generate(base: Path, first: Path, second: Path, as_recorded: AsRecorded) -> None:
    model = peft.PeftModel.from_pretrained(base_model(base), first, adapter_name="a")
    model.load_adapter(second, adapter_name="b")
    rows = {key: value.repeat(3, 1) for key, value in tokens(base).items()}
    texts: list[str] = []

    class Streamer(tf.TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            texts.append(text)

    figures = {
        "greedy": answer(model, base),
        "beam": answer(model, base, num_beams=3),
        "assisted": answer(model, base, assistant_model=base_model(base)),
        "assists": answer(base_model(base), base, assistant_model=model),
        "lookup": answer(model, base, prompt_lookup_num_tokens=2),
        "static": answer(model, base, cache_implementation="static"),
        "by row": model.generate(
            **rows, max_new_tokens=4, do_sample=False, adapter_names=["a", "b", "__base__"]
        ).tolist(),
    }
    answer(model, base, streamer=Streamer(tf.AutoTokenizer.from_pretrained(base)))
    with model.disable_adapter():
        figures["disabled"] = answer(model, base)
    torch.manual_seed(0)
    sampled = model.generate(**tokens(base), max_new_tokens=4, do_sample=True, top_k=20)
    as_recorded({**figures, "streamed": "".join(texts), "sampled": sampled.tolist()})


def test_generate_batch(base: Path, first: Path, second: Path, as_recorded: AsRecorded) -> None:
    model = peft.PeftModel.from_pretrained(base_model(base), first, adapter_name="a")
    model.load_adapter(second, adapter_name="b")
    prompt = tokens(base)["input_ids"][0].tolist()

    def batch(**options: Any) -> list[list[int]]:
        plain = tf.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=0)
        small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
        outputs = model.generate_batch(
            [prompt, prompt[:2]], generation_config=plain, continuous_batching_config=small, **options
        )
        return [output.generated_tokens for output in outputs.values()]

    figures = {"a": batch()}
    model.set_adapter("b")
    figures["b"] = batch()
    with model.disable_adapter():
        figures["base"] = batch()
    as_recorded(figures)
    if not conftest.RECORDING:  # what peft has not, or does not heed
        with model.using("a"):
            assert batch() == figures["a"]
        assert batch(adapter_names=["a", "b"]) == [figures["a"][0], figures["b"][1]]


def test_a_streamer_with_a_thread_of_its_own(base: Path, first: Path, as_recorded: AsRecorded) -> None:
    model = peft.PeftModel.from_pretrained(base_model(base), first)
    tokenizer = tf.AutoTokenizer.from_pretrained(base)

    def streamed() -> str:
        streamer = tf.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        options = {**tokens(base), "max_new_tokens": 5, "do_sample": False, "streamer": streamer}
        thread = Thread(target=model.generate, kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join()
        return text

    figures = {"adapter": streamed()}
    with model.disable_adapter():
        figures["base"] = streamed()
    as_recorded({**figures, "again": streamed()})


def test_an_older_adapter_of_single_experts(tmp_path: Path, as_recorded: AsRecorded) -> None:
    """One from before transformers 5, which keeps all experts of a layer in one parameter."""
    base = save_moe(tmp_path / "base")
    folder = save_expert_adapter(tmp_path / "old", base)
    model = base_model(base)
    plain = last_logits(model, base)
    info = model.load_adapter(folder)
    loaded = last_logits(model, base)
    model.save_pretrained(tmp_path / "new")
    again = base_model(base)
    again.load_adapter(tmp_path / "new", adapter_name="other")
    assert last_logits(again, base) == pytest.approx(loaded, abs=1e-5)
    wrapped = peft.PeftModel.from_pretrained(base_model(base), folder)
    as_recorded(
        {
            "missing": sorted(info.missing_keys),
            "plain": plain,
            "loaded": loaded,
            "wrapped": last_logits(wrapped, base),
        }
    )
