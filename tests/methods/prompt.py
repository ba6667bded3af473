"""What a prompt method's file beside this one (``prompt_<peft_type>.py``) gives to its contract: its ``CASES``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptCase:
    """One config of one prompt method on one model.

    Attributes:
        arch: the model, a key of ``tests.models.CASES``.
        config: the class's name, the same here and in peft.
        options: what both configs are given.
        tasks: the ``task_ids`` of a batch of two.
        label: tells it from others on the same model.
        fills_cache: whether it fills the cache instead of lengthening the input.
        labels_differ: why peft's loss is another, if it is.
    """

    arch: str
    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[int, int] | None = None
    label: str = ""
    fills_cache: bool = False
    labels_differ: str | None = None

    @property
    def choice(self) -> dict[str, Tensor]:
        """What a call is given beside the batch."""
        return {} if self.tasks is None else {"task_ids": torch.tensor(self.tasks)}


def everywhere(config: str, fills_cache: bool = False, **options: Any) -> list[PromptCase]:
    """The same config on each kind of model."""
    archs, given = ("llama", "gpt2", "bert", "t5"), {"num_virtual_tokens": 4, **options}
    return [PromptCase(arch, config, given, fills_cache=fills_cache) for arch in archs]
