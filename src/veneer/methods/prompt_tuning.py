"""Prompt tuning: trained embeddings before the input's own (Lester et al. 2021, arXiv:2104.08691, section 2).

    X' = [P; X]        P: (tokens, dim), X: (length, dim)

For an encoder-decoder the encoder's input gets them. Its checkpoints hold as many again, which nothing reads: so it is
in peft.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.base_model.transformers_errors import transformers_errors_as
from veneer.configs.methods.prompt_tuning import PromptTuningConfig
from veneer.errors import ConfigError
from veneer.methods.base.prompt_method import EmbeddingTable, PromptEncoder, PromptMethod


class PromptTuning(PromptMethod[PromptTuningConfig]):
    """Makes prompts that are trained embeddings."""

    def new(self, config: PromptTuningConfig, words: nn.Module, generator: torch.Generator | None) -> PromptEncoder:
        return EmbeddingTable(start(config, self.size(config), words, generator).requires_grad_())


METHOD = PromptTuning()


@torch.no_grad()
def start(
    config: PromptTuningConfig, size: tuple[int, int], words: nn.Module, generator: torch.Generator | None
) -> Tensor:
    """Return the embeddings that a new prompt starts from, shape ``size``, float32 (section 2.1)."""
    tokens, _ = size
    if config.prompt_tuning_init == "TEXT":
        index = torch.tensor(_text(config, tokens))
    elif config.prompt_tuning_init == "SAMPLE_VOCAB":
        index = torch.randint(_weight(words).shape[0], (tokens,), generator=generator)
    else:
        return torch.randn(size, generator=generator)
    values: Tensor = words(index.to(_weight(words).device))
    return values.detach().float().clone()


def _weight(words: nn.Module) -> Tensor:
    weight = words.weight
    assert isinstance(weight, Tensor)
    return weight


def _text(config: PromptTuningConfig, tokens: int) -> list[int]:
    """Return the first ``tokens`` token ids of the config's text, repeated as often as that takes."""
    from transformers import AutoTokenizer

    # Without trust_remote_code, which is False by default: a config must not have code run.
    options = {key: value for key, value in (config.tokenizer_kwargs or {}).items() if key != "trust_remote_code"}
    what = f"tokenizer_name_or_path={config.tokenizer_name_or_path!r}: transformers cannot use the tokenizer there"
    with transformers_errors_as(
        ConfigError, what, "Name the base's folder or hub id. Code that comes with it is not run."
    ):
        tokenizer: Any = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
        ids: list[int] = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    return (ids * (tokens // len(ids) + 1))[:tokens]
