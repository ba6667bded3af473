"""Optimisers for adapters. LoRA+ (Hayou et al. 2024, arXiv:2402.12354): ``B`` learns faster than ``A``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from veneer.errors import ConfigError


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """An optimiser in which ``B`` has ``loraplus_lr_ratio`` times the learning rate of ``A``.

    Args:
        model: the model; what of it is to be trained is optimised.
        optimizer_cls: such as ``torch.optim.AdamW``.
        lr: the learning rate of ``A``, and of modules that are saved whole.
        loraplus_lr_ratio: that of ``B`` and of every vector, as a multiple; the paper finds 16 a good start.
        loraplus_weight_decay: for all but biases and norms of the faster group.
        loraplus_lr_embedding: the learning rate of a LoRA on an embedding.
        **kwargs: for ``optimizer_cls``.

    Raises:
        ConfigError: nothing is to be trained.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ConfigError(
            "No parameter of this model is to be trained.", hint="Load the adapter with is_trainable=True."
        )
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    fast = lr * loraplus_lr_ratio
    rates = {"slow": lr, "embedding": loraplus_lr_embedding, "fast": fast, "bare": fast}
    groups = {key: [p for name, p in named if _group(name, p, norms) == key] for key in rates}
    return optimizer_cls(
        [
            {"params": own, "lr": rates[key], "weight_decay": 0.0 if key == "bare" else loraplus_weight_decay}
            for key, own in groups.items()
        ],
        lr=lr,
        **kwargs,
    )


def _group(name: str, parameter: Tensor, norms: set[int]) -> str:
    """Which group a parameter is in, by its name in memory."""
    if "lora_embedding_" in name:
        return "embedding"
    if "lora_B." not in name and parameter.ndim != 1:
        return "slow"
    return "bare" if "bias" in name or id(parameter) in norms else "fast"
