"""Makes any optimiser step LoRA's factors along the metric of the low-rank matrices (Zhang and Pilanci 2024).

g_A' = (B^T B + reg I)^-1 g_A        g_B' = g_B (A A^T + reg I)^-1        arXiv:2402.02347, equation 2
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from veneer.errors import ConfigError, UsageError
from veneer.keywords import check_passed_on
from veneer.methods.lora import A, B
from veneer.training.optimizers import lora_factors


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 0.01, **kwargs: Any
) -> Optimizer:
    """Make an optimiser that multiplies the gradients of LoRA's ``A`` and ``B`` by the inverses above before each step.

    The other parameters that are trained (magnitudes, LoRA on embeddings, modules that are saved whole) are stepped as
    ``optimizer_cls`` steps them.

    Args:
        model: the model with adapters, whose trainable parameters are optimised.
        optimizer_cls: a class of ``torch.optim``, such as ``AdamW``, whose step needs no closure.
        lr: the learning rate.
        reg: added to the diagonal of the matrices of ``r`` rows that are inverted.
        **kwargs: for ``optimizer_cls``.

    Raises:
        ConfigError: no LoRA on a layer with a plain weight is to be trained, or the optimiser needs a closure.
        UnknownKeywordError: ``optimizer_cls`` does not take one of ``kwargs``. TypeError: it is no optimiser.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, not {optimizer_cls!r}.")
    check_passed_on(create_riemannian_optimizer, kwargs, optimizer_cls)
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{optimizer_cls.__name__} requires a closure, in which it computes gradients again on its own.",
            hint="Use an optimiser that steps once, such as AdamW.",
        )
    pairs = lora_pairs(model)
    if not pairs:
        raise ConfigError(
            "The model has no lora_A/lora_B parameter pairs that are to be trained.",
            hint="Put a LoRA on it with get_peft_model, or load one with is_trainable=True.",
        )
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)  # type: ignore[call-arg]
    optimizer.register_step_pre_hook(Preconditioner(pairs, reg))
    return optimizer


def lora_pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Return ``A``, shape ``(r, in)``, and ``B``, shape ``(out, r)``, of each trainable LoRA with such factors."""
    pairs = [(tensors[A], tensors[B]) for _, _, tensors in lora_factors(model)]
    return [(down, up) for down, up in pairs if down.ndim == up.ndim == 2 and up.requires_grad]


class Preconditioner:
    """Multiplies the gradients of pairs of LoRA's factors, as a hook before an optimiser's step."""

    def __init__(self, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], reg: float) -> None:
        self.pairs = pairs
        self.reg = reg

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Change the gradients that the step reads."""
        if any(value is not None for value in (*args[1:], kwargs.get("closure"))):
            raise UsageError(
                "This optimiser does not support closures, which would compute the gradients again.",
                hint="Call backward() first, and step() without a closure.",
            )
        self.step()

    @torch.no_grad()
    def step(self) -> None:
        """Change the gradients of all pairs, from the factors as they are now."""
        for down, up in self.pairs:
            a, b = down.float(), up.float()
            if down.grad is not None:
                down.grad.copy_(self._inverse(b.T @ b) @ down.grad.float())
            if up.grad is not None:
                up.grad.copy_(up.grad.float() @ self._inverse(a @ a.T))

    def _inverse(self, gram: Tensor) -> Tensor:
        inverse: Tensor = torch.linalg.inv(gram + self.reg * torch.eye(len(gram), device=gram.device))
        return inverse
