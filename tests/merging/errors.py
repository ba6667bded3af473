"""Measures how far a merged weight is from the exact sum, here and in peft.

``python -m tests.merging.errors`` prints the table.

The exact sum is peft's own merge of the same base and adapter with every tensor in float64. A figure is the norm of
the difference to it, as a share of the norm of the adapter's change. No merge into a dtype can do better than the exact
sum rounded to it once: that is the limit.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import Tensor, nn

import veneer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class One(nn.Module):
    """One layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


@dataclass(frozen=True)
class Kind:
    """A layer and an adapter of it: the config's class and its options."""

    make: Callable[[], nn.Module]
    config: str
    options: Mapping[str, Any] = field(default_factory=dict)


def _linear() -> nn.Module:
    return nn.Linear(192, 160)


KINDS = {
    "LoRA": Kind(_linear, "LoraConfig", {"r": 16}),
    "DoRA": Kind(_linear, "LoraConfig", {"r": 16, "use_dora": True}),
    "LoRA, convolution": Kind(lambda: nn.Conv2d(24, 32, (3, 5)), "LoraConfig", {"r": 8}),
    "LoRA, embedding": Kind(lambda: nn.Embedding(300, 64), "LoraConfig", {"r": 8}),
    "VeRA": Kind(_linear, "VeraConfig", {"r": 32}),
    "LoHa": Kind(_linear, "LoHaConfig", {"r": 8}),
    "LoKr": Kind(_linear, "LoKrConfig", {"r": 4}),
    "OFT": Kind(_linear, "OFTConfig", {"r": 0, "oft_block_size": 32, "use_cayley_neumann": False}),
    "HRA": Kind(_linear, "HRAConfig", {"r": 8}),
    "IA3": Kind(_linear, "IA3Config", {"feedforward_modules": []}),
    "FourierFT": Kind(_linear, "FourierFTConfig", {"n_frequency": 200}),
}


@dataclass(frozen=True)
class Errors:
    """Of one kind in one dtype: peft's merge, its ``safe_merge``, ours, and the limit."""

    peft: float
    safe: float
    veneer: float
    limit: float


@torch.no_grad()
def errors(kind: Kind, dtype: torch.dtype) -> Errors:
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        base = One(kind.make()).to(dtype).eval()
        model = peft.get_peft_model(
            copy.deepcopy(base), getattr(peft, kind.config)(target_modules=["layer"], **kind.options)
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.save_pretrained(folder)

        def weight(library: Any, own: nn.Module, **options: Any) -> Tensor:
            loaded = library.PeftModel.from_pretrained(copy.deepcopy(own), folder)
            loaded = loaded.double() if own is wide else loaded
            return loaded.merge_and_unload(**options).layer.weight

        wide = copy.deepcopy(base).double()
        exact, before = weight(peft, wide), base.layer.weight.double()

        def error(found: Tensor) -> float:
            return float((found.double() - exact).norm() / (exact - before).norm())

        return Errors(
            error(weight(peft, base)),
            error(weight(peft, base, safe_merge=True)),
            error(weight(veneer, base)),
            error(exact.to(dtype)),
        )


def table() -> str:
    """Return the figures as Markdown: a row for each kind, peft's and ours for each dtype."""
    heads = [f"{label}, {who}" for label in DTYPES for who in ("peft", "Veneer")]
    rows = ["| adapter | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, kind in KINDS.items():
        found = [errors(kind, dtype) for dtype in DTYPES.values()]
        figures = [f"{value:.2e}" for one in found for value in (one.peft, one.veneer)]
        rows.append(f"| {name} | " + " | ".join(figures) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
