"""What a method's file beside this one (``case_<peft_type>.py``) gives to the contract: its configs, as ``CASES``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def scramble(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """What a trainable parameter becomes, so that the adapter has a visible effect: itself and some noise."""
    return parameter + 0.2 * torch.randn(parameter.shape, generator=generator)


@dataclass(frozen=True)
class Case:
    """One config of one method on one network.

    Attributes:
        label: tells it from the method's others.
        network: a key of ``NETWORKS``.
        config: the class's name, the same here and in peft.
        options: what both configs are given.
        merges: whether the method has a merged form.
        peer_merges: whether peft can merge it; ``merged`` is compared with unmerged alone where it cannot.
        rows: whether rows of a batch may use different adapters.
        close: how near the outputs must be, as a relative gap in float32.
        starts_still: whether a fresh adapter changes nothing.
        scramble: (name, parameter, generator) -> the parameter's value under test.
        visible: how much the output must change at least, as a relative gap.
        lora_targets: what a LoRA beside it targets; the same modules by default.
        prepare: is given the fresh base of either side, for methods that need one of a special kind.
        ours_differs: why peft's unmerged output is wrong here, if it is; then only its merged one is compared with
            (unless ``peer_merges`` is off, for when that is wrong too).
        says_nothing: a regular expression for the keys that peft writes and that need not be kept.
    """

    label: str
    network: str
    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    merges: bool = True
    peer_merges: bool = True
    rows: bool = True
    close: float = 1e-5
    starts_still: bool = True
    scramble: Callable[[str, Tensor, torch.Generator], Tensor] = scramble
    visible: float = 0.02
    lora_targets: Any = None
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    says_nothing: str | None = None
    ours_differs: str | None = None
