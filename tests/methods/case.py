"""What a method's file beside this one (``case_<peft_type>.py``) gives to the contract: its configs, as ``CASES``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


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
        learns_in_training: whether some of its tensors have a part in training alone.
        scramble: (name, parameter, generator) -> the parameter's value under test.
        visible: how much the output must change at least, as a relative gap.
        lora_targets: what a LoRA beside it targets; the same modules by default.
        prepare: is given the fresh base of either side, for methods that need one of a special kind.
        peer_prepare: is given peft's afterwards, where that adapts fewer kinds of layer.
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
    learns_in_training: bool = False
    scramble: Callable[[str, Tensor, torch.Generator], Tensor] = scramble
    visible: float = 0.02
    lora_targets: Any = None
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    peer_prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    says_nothing: str | None = None
    ours_differs: str | None = None


# The same role in another network: what a case that is made from another one's targets.
_ROLES = {
    "gpt2": {
        "q_proj": "c_attn",
        "v_proj": "c_attn",
        "down_proj": "c_fc",
        "embed_tokens": "wte",
        "query": "c_attn",
        "value": "c_attn",
        "intermediate.dense": "c_fc",
    },
    "bert": {
        "q_proj": "query",
        "v_proj": "value",
        "down_proj": "intermediate.dense",
        "embed_tokens": "word_embeddings",
        "c_attn": "query",
        "c_fc": "intermediate.dense",
    },
}
# A network -> those of which a case is wanted, the first by default.
_WANTED = {"gpt2": ("gpt2",), "bert": ("bert", "t5")}


def cases(kind: str = "case") -> list[tuple[str, Any]]:
    """Method and case, for every file ``KIND_*.py`` here; and on the networks that a method's own cases leave out."""
    files = sorted(Path(__file__).parent.glob(f"{kind}_*.py"))
    names = [file.stem.removeprefix(f"{kind}_") for file in files]
    own = {name: importlib.import_module(f"tests.methods.{kind}_{name}").CASES for name in names}
    return [(name, case) for name, given in own.items() for case in (*given, *(_elsewhere(given)))]


def _elsewhere(given: Sequence[Any]) -> Iterator[Case]:
    first = next(iter(given), None)
    if not isinstance(first, Case) or first.network not in ("llama", "bert") or "target_modules" not in first.options:
        return
    for network, enough in _WANTED.items():
        if not any(case.network in enough for case in given):
            yield _moved(first, network)


def _moved(case: Case, network: str) -> Case:
    """The same case on another network; peft sees a linear layer where that has its transpose."""
    roles = _ROLES[network]
    options = {key: value for key, value in case.options.items() if not key.endswith("_pattern")}
    options["target_modules"] = sorted({roles[name] for name in options["target_modules"]})
    return replace(case, label=network, network=network, options=options, peer_prepare=linear_for_conv1d)


def linear_for_conv1d(model: nn.Module) -> nn.Module:
    """Put a linear layer in the place of each of GPT-2's transposed ones; outputs stay the same."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data, linear.bias.data = child.weight.data.T.contiguous(), child.bias.data
                setattr(module, name, linear)
    return model
