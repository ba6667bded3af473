"""Adapters of the tiny base by the thousand, written without torch, and what ``generate`` answers under each."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import save_file

from tests.models import LLAMA, VOCAB
from tests.serving.engine_world import base
from veneer.peft_model.peft_model import wrap
from veneer.serving.fetch import digest_in

# Two ways to compute the same logits differ by less, relative to the largest.
_ROUNDING = 1e-5
FILES = ("adapter_config.json", "adapter_model.safetensors")
_HIDDEN, _INNER = LLAMA["hidden_size"], LLAMA["intermediate_size"]
_KEYS_AND_VALUES = _HIDDEN * LLAMA["num_key_value_heads"] // LLAMA["num_attention_heads"]
# Module -> where it is, and the shape of its weight.
_SHAPES = {
    "q_proj": ("model.layers.{}.self_attn.q_proj", (_HIDDEN, _HIDDEN)),
    "k_proj": ("model.layers.{}.self_attn.k_proj", (_KEYS_AND_VALUES, _HIDDEN)),
    "v_proj": ("model.layers.{}.self_attn.v_proj", (_KEYS_AND_VALUES, _HIDDEN)),
    "o_proj": ("model.layers.{}.self_attn.o_proj", (_HIDDEN, _HIDDEN)),
    "down_proj": ("model.layers.{}.mlp.down_proj", (_HIDDEN, _INNER)),
    "lm_head": ("lm_head", (VOCAB, _HIDDEN)),
}
_TARGETS = (
    ("q_proj", "v_proj"),
    ("q_proj", "v_proj", "down_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "lm_head"),
)


def write_adapter(folder: Path, seed: int, form: int | None = None) -> str:
    """Write an adapter, and return its digest.

    Args:
        folder: where to.
        seed: of its numbers.
        form: the seed of its config: LoRA of rank 1 to 16, rsLoRA, DoRA or IA3; that of its numbers when ``None``.
    """
    chance, generator = random.Random(seed if form is None else form), np.random.default_rng(seed)
    kind = chance.choices(("lora", "rslora", "dora", "ia3"), (6, 1, 2, 1))[0]
    targets = ("k_proj", "v_proj", "down_proj") if kind == "ia3" else chance.choice(_TARGETS)
    rank = chance.randint(1, 16)
    tensors: dict[str, Any] = {}
    for place, (out, into) in _places(targets):
        if kind == "ia3":
            shape = (1, into) if place.endswith("down_proj") else (out, 1)
            tensors[f"{place}.ia3_l"] = 1 + generator.standard_normal(shape, np.float32)
        else:
            tensors[f"{place}.lora_A.weight"] = 0.3 * generator.standard_normal((rank, into), np.float32)
            tensors[f"{place}.lora_B.weight"] = 0.3 * generator.standard_normal((out, rank), np.float32)
        if kind == "dora":
            tensors[f"{place}.lora_magnitude_vector"] = 0.1 + generator.random(out, np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / FILES[1], {"format": "pt"})
    (folder / FILES[0]).write_text(json.dumps(_config(kind, rank, targets)))
    return digest_in(folder, FILES)


def _places(targets: Iterable[str]) -> Iterable[tuple[str, tuple[int, int]]]:
    for place, shape in (_SHAPES[target] for target in targets):
        for layer in range(LLAMA["num_hidden_layers"] if "{}" in place else 1):
            yield f"base_model.model.{place.format(layer)}", shape


def _config(kind: str, rank: int, targets: tuple[str, ...]) -> dict[str, Any]:
    values: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": list(targets)}
    if kind == "ia3":
        return {**values, "peft_type": "IA3", "feedforward_modules": ["down_proj"]}
    options = {"use_rslora": kind == "rslora", "use_dora": kind == "dora"}
    return {**values, "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, **options}


class Question(NamedTuple):
    """A prompt for a version of an adapter, or for the base: ``None``."""

    digest: str | None
    prompt: tuple[int, ...]


class Oracle:
    """Asks ``generate``; quick where questions about one version come one after another, the longest answers first.

    Args:
        folders: digest -> the folder of the adapter.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = folders
        self._model = wrap(base()).eval().requires_grad_(False)
        self._answers: dict[Question, list[int]] = {}

    def answer(self, question: Question, tokens: int) -> list[int]:
        """Return the first tokens of an answer."""
        if len(self._answers.get(question, ())) < tokens:
            self._answers[question] = self._generated(question, tokens)
        return self._answers[question][:tokens]

    def allows(self, question: Question, answer: Sequence[int]) -> bool:
        """Tell whether each token is the likeliest behind those before it, but for rounding: two may be as likely."""
        ids = [*question.prompt, *answer]
        with self._under(question.digest), torch.no_grad():
            logits = self._model(input_ids=torch.tensor([ids])).logits[0, len(question.prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        return bool((logits.amax(1) - chosen <= _ROUNDING * logits.abs().amax()).all())

    def _generated(self, question: Question, tokens: int) -> list[int]:
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with self._under(question.digest), torch.no_grad():
            ids = torch.tensor([question.prompt])
            output = self._model.generate(input_ids=ids, max_new_tokens=tokens, **options)
        return list(output[0, len(question.prompt) :].tolist())

    def _under(self, digest: str | None) -> AbstractContextManager[None]:
        if digest is None:
            return self._model.disable_adapter()
        if digest not in self._model.adapters.by_name:
            for other in list(self._model.adapters.by_name):
                self._model.delete_adapter(other)
            self._model.load_adapter(self._folders[digest], adapter_name=digest)
        return self._model.using(digest)
