"""The options of LoRA's variants: ``use_bdlora``, ``kasa_config``, ``monteclora_config``, ``velora_config``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from veneer.configs.value_checks import Checked
from veneer.errors import ConfigError


def _check_positive(options: object, *names: str) -> None:
    for name in names:
        if getattr(options, name) <= 0:
            raise ConfigError(
                f"{type(options).__name__}: `{name}` should be positive, got {getattr(options, name)!r}.",
                hint=f"The default is {getattr(type(options), name)!r}.",
            )


@dataclass
class BdLoraConfig(Checked):
    """BD-LoRA: A or B is block-diagonal, so that servers that spread a layer over devices need not exchange it.

    Args:
        target_modules_bd_a: parts of layers' names; those layers have a block-diagonal A.
        target_modules_bd_b: the same for B.
        nblocks: how many blocks.
        match_strict: whether every adapted layer must be of one of the two kinds.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "nblocks")
        both = sorted(set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ()))
        if both:
            raise ConfigError(
                f"BdLoraConfig: Found overlapping modules in target_modules_bd lists: {both}.",
                hint="Name each in one of them: a layer has one block-diagonal factor.",
            )


@dataclass
class KasaConfig(Checked):
    """KaSA: LoRA with trained singular values, on a weight that loses its r smallest.

    Args:
        beta: weight of the squared singular values in the loss.
        gamma: weight of how far A and B are from orthogonal.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "gamma"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"KasaConfig: `{name}` must be non-negative, and is {getattr(self, name)!r}.",
                    hint=f"The default is {getattr(type(self), name)!r}.",
                )


@dataclass
class MontecloraConfig(Checked):
    """MonteCLoRA: LoRA that is trained under noise on A of a learned size.

    Args:
        num_samples: how many draws are averaged in a step.
        use_entropy: whether the loss also keeps the draws' weights even.
        dirichlet_prior: the prior of those weights: larger for more even ones.
        sample_scaler: multiplies the noise.
        kl_loss_weight: weight of the distance from the priors in the loss.
        buffer_size: how many draws peft makes in advance; without effect here.
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "num_samples", "dirichlet_prior", "buffer_size")


@dataclass
class VeloraConfig(Checked):
    """VeLoRA: LoRA whose training keeps one number for each group of input features.

    Args:
        num_groups: how many groups; more cost memory and lose less.
        scale: multiplies what is restored for the gradient of A.
        init_type: where the projection comes from: every batch, the first one, or a random draw.
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average_once", "batch_average", "random"] = "batch_average"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "num_groups", "scale")
