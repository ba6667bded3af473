"""A tiny base, adapters of several methods in folders, and what ``generate`` answers under each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as tf

import veneer
from tests.models import LLAMA, VOCAB
from tests.random_adapters import enlarge
from veneer.patches.selection import BASE
from veneer.serving.engine import EngineOptions, TransformersEngine
from veneer.serving.engine_types import EngineRequest, Sampling, TokenEvent

OPTIONS = EngineOptions(max_batch_tokens=24, max_requests=8, page_size=8, cache_bytes=2 * 2 * 2 * 8 * 4 * 1024)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def base() -> Any:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**LLAMA, "max_position_embeddings": 128})).float().eval()


def lora(rank: int, **options: Any) -> veneer.LoraConfig:
    chosen = {"target_modules": TARGETS, "lora_alpha": 2 * rank, **options}
    return veneer.LoraConfig(r=rank, task_type="CAUSAL_LM", init_lora_weights=False, **chosen)


CONFIGS: dict[str, Any] = {
    "r1": lora(1),
    "r3": lora(3),
    "r8": lora(8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    "r16": lora(16),
    "rs": lora(4, use_rslora=True),
    "dora": lora(4, use_dora=True),
    "head": lora(2, target_modules=["q_proj", "lm_head"]),
    "ia3": veneer.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
}


class World:
    """The folders of adapters, and the oracle."""

    def __init__(self, folder: Path, configs: dict[str, Any] = CONFIGS, make: Any = base) -> None:
        self.folders = {name: folder / name for name in configs}
        self.model = veneer.get_peft_model(make(), configs[next(iter(configs))], adapter_name=next(iter(configs)))
        for number, (name, config) in enumerate(configs.items()):
            if number:
                self.model.add_adapter(name, config)
            enlarge(self.model, name, seed=number + 1)
        self.model.eval().requires_grad_(False)
        self.model.save_pretrained(folder)
        first = next(iter(configs))
        if not self.folders[first].is_dir():
            self.folders[first] = folder
        self._answers: dict[Any, list[int]] = {}

    def answer(self, version: str | None, prompt: Sequence[int], tokens: int) -> list[int]:
        """The tokens that ``generate`` gives."""
        key = version, tuple(prompt), tokens
        if key not in self._answers:
            chosen = self.model.disable_adapter() if version is None else self.model.using(version)
            ids = torch.tensor([list(prompt)])
            with chosen, torch.no_grad():
                out = self.model.generate(
                    input_ids=ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
                )
            self._answers[key] = out[0, len(prompt) :].tolist()
        return self._answers[key]

    def logits(self, version: str | None, ids: Sequence[int]) -> torch.Tensor:
        """The logits behind each token."""
        chosen = self.model.disable_adapter() if version is None else self.model.using(version)
        with chosen, torch.no_grad():
            return self.model(input_ids=torch.tensor([list(ids)])).logits[0].float()


def tokenizer(end: str | None = "w2", pad: str | None = "w0") -> Any:
    """A fast tokenizer whose tokens are the words ``w0 w1 ...``; of those that are special no text tells."""
    words = {f"w{number}": number for number in range(VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=pad)


@contextmanager
def running(options: EngineOptions = OPTIONS, model: Any = None, words: Any = None) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(base() if model is None else model, options, words)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(timeout=0.0)
        assert not engine._lane.jobs


def request(
    number: Any, prompt: Sequence[int], version: str | None = None, max_tokens: int = 8, **options: Any
) -> EngineRequest:
    options = {"temperature": 0.0, "ignore_eos": True, **options}
    return EngineRequest(str(number), tuple(prompt), version, Sampling(max_tokens=max_tokens, **options))


async def events_of(engine: TransformersEngine, asked: EngineRequest) -> list[TokenEvent]:
    return [event async for event in engine.generate(asked)]


async def tokens_of(engine: TransformersEngine, asked: EngineRequest) -> list[int]:
    return [event.token for event in await events_of(engine, asked) if event.token is not None]


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(3, VOCAB, (3 + 7 * number % longest,), generator=generator).tolist() for number in range(count)
    ]


def run(main: Any) -> Any:
    """Run a coroutine, and let none hang a test."""
    return asyncio.run(asyncio.wait_for(main, 60))


NAMES = [BASE, *CONFIGS]
