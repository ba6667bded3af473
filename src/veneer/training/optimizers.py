"""Makes optimisers for adapters.

LoRA+ (Hayou et al. 2024, arXiv:2402.12354): ``B`` learns faster than ``A``.

LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): ``A`` stays as it began, and ``B``'s gradient is that by which the change
``scale * B A`` comes closest to a step of the whole weight:

    g' = g (A A^T)^-1 / scale^2        A: (r, in), g: (out, r)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from veneer.configs.methods.lora import LoraConfig
from veneer.errors import ConfigError
from veneer.keywords import check_passed_on, takes
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.methods.lora import A, B, LoraSettings


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
    """Make an optimiser in which ``B`` has ``loraplus_lr_ratio`` times the learning rate of ``A`` (LoRA+).

    Args:
        model: the model, whose trainable parameters are optimised.
        optimizer_cls: such as ``torch.optim.AdamW``.
        lr: the learning rate of ``A``, and of modules that are saved whole.
        loraplus_lr_ratio: the learning rate of ``B`` and of every vector, as a multiple of ``lr``; the paper finds 16 a
            good start.
        loraplus_weight_decay: for all parameters but biases and norms of the faster group.
        loraplus_lr_embedding: the learning rate of a LoRA on an embedding.
        **kwargs: for ``optimizer_cls``.

    Raises:
        ConfigError: no parameter is trainable. UnknownKeywordError: ``optimizer_cls`` does not take one of ``kwargs``.
    """
    check_passed_on(create_loraplus_optimizer, kwargs, optimizer_cls)
    named = _trainable(model)
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    fast = lr * loraplus_lr_ratio
    rates = {"slow": lr, "embedding": loraplus_lr_embedding, "fast": fast, "bare": fast}
    groups = {key: [p for name, p in named if _group(name, p, norms) == key] for key in rates}
    return optimizer_cls(
        [
            {"params": parameters, "lr": rates[key], "weight_decay": 0.0 if key == "bare" else loraplus_weight_decay}
            for key, parameters in groups.items()
        ],
        lr=lr,
        **kwargs,
    )


@takes()
def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """Make an AdamW in which the LoRA on a linear layer trains its ``B`` alone (LoRA-FA); its ``A`` gets no gradients.

    The inputs of a layer then need not be kept for the backward pass, only their ``r`` projections. Plain AdamW trains
    the other parameters (LoRA on other kinds of layer, biases, modules that are saved whole).

    Args:
        model: the model, with its LoRA adapters.
        r: their rank.
        lora_alpha: their alpha. A layer to which a pattern gives another rank or alpha is scaled by its own.
        lr: the learning rate.
        weight_decay: for everything that is trained.
        use_rslora: whether they are rank-stabilised; ``None`` for the adapters' own.

    Raises:
        ConfigError: no parameter is trainable, no linear layer has a trainable LoRA, or one of the adapters has another
            rank, alpha or ``use_rslora``.
    """
    _trainable(model)
    pairs = list(_pairs(model))
    if not pairs:
        raise ConfigError(
            "No LoRA on a linear layer of this model is to be trained.",
            hint="LoRA-FA is for those: use an optimiser of torch.optim.",
        )
    _check_configs(model, {"r": r, "lora_alpha": lora_alpha, "use_rslora": use_rslora})
    for down, *_ in pairs:
        down.requires_grad_(False)
    partners = {id(up): (down, scale) for down, up, scale in pairs}
    return LoraFa([p for _, p in _trainable(model)], partners, lr=lr, weight_decay=weight_decay)


class LoraFa(Optimizer):
    """AdamW that projects the gradients of some parameters; the step is that of BERT's optimiser.

    Args:
        params: the parameters.
        partners: id of a ``B``, shape ``(out, r)`` -> its frozen ``A``, shape ``(r, in)``, and its scale.
        lr: the learning rate.
        betas: the shares of the mean and of the mean square of the gradients that a step keeps.
        eps: added to the root of the mean square, before its start at zero is corrected.
        weight_decay: the share of a parameter that a step takes off, times ``lr``.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        partners: Mapping[int, tuple[Tensor, float]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.partners = partners

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient; return the loss that ``closure`` computes anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, self._gradient(parameter), group)
        return loss

    def _gradient(self, parameter: Tensor) -> Tensor:
        """Return a parameter's gradient, projected where the parameter is a ``B``."""
        assert parameter.grad is not None
        if id(parameter) not in self.partners:
            return parameter.grad
        down, scale = self.partners[id(parameter)]
        down = down.float()
        # A may have fewer independent rows than r, and then no inverse.
        inverse = torch.linalg.pinv(down @ down.T, hermitian=True)
        projected: Tensor = parameter.grad.float() @ inverse / scale**2
        return projected.to(parameter.grad.dtype)

    def _move(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        first, second = group["betas"]
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        correction = math.sqrt(1 - second ** state["step"]) / (1 - first ** state["step"])
        parameter.addcdiv_(state["mean"], state["square"].sqrt().add_(group["eps"]), value=-group["lr"] * correction)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """List a model's trainable parameters by name; raise ``ConfigError`` when there are none."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ConfigError(
            "No parameter of this model is to be trained.", hint="Load the adapter with is_trainable=True."
        )
    return named


def lora_factors(model: nn.Module) -> Iterator[tuple[AdaptedLayer, LoraSettings, dict[str, nn.Parameter]]]:
    """Yield each layer with the settings and the tensors of each LoRA on it that has an ``A`` and a ``B``."""
    for layer in model.modules():
        if not isinstance(layer, AdaptedLayer):
            continue
        for adapter, share in [(name, share) for name, shares in layer.bound.items() for share in shares]:
            if not isinstance(share.settings, LoraSettings):
                continue
            tensors = layer.tensors(adapter, share)
            if tensors.keys() >= {A, B}:
                yield layer, share.settings, tensors


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter, float]]:
    """Yield ``A``, ``B`` and the scale of each plain LoRA on a linear layer whose ``B`` is trainable."""
    for layer, settings, tensors in lora_factors(model):
        if layer.site.matrix_input and settings.variant is None and tensors[B].requires_grad:
            yield tensors[A], tensors[B], float(settings.scale)


def _check_configs(model: nn.Module, expected: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` unless the active adapters have the options that the caller gives."""
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    for name in getattr(model, "active_adapters", ()):
        config = configs[name]
        if not isinstance(config, LoraConfig):
            continue
        for option, value in expected.items():
            actual = getattr(config, option)
            if value is not None and value != actual:
                raise ConfigError(
                    f"{option}={value!r} was passed to create_lorafa_optimizer, and the adapter {name!r} has "
                    f"{option}={actual!r}.",
                    hint="Give create_lorafa_optimizer the values of the adapter's config.",
                )


def _group(name: str, parameter: Tensor, norms: set[int]) -> str:
    """Return the group of a parameter, by its name in memory."""
    if "lora_embedding_" in name:
        return "embedding"
    if "lora_B." not in name and parameter.ndim != 1:
        return "slow"
    return "bare" if "bias" in name or id(parameter) in norms else "fast"
