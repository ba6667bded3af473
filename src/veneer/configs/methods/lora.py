"""The config of LoRA and its variants."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from veneer.configs.arrow_options import ArrowConfig
from veneer.configs.base import TargetedConfig
from veneer.configs.lora_start_options import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, options_of
from veneer.configs.lora_variant_options import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import Checked, check_share
from veneer.errors import ConfigError, did_you_mean
from veneer.printing import warn

STARTS = ("gaussian", "orthogonal", "pissa", "pissa_niter_[n]", "olora", "eva", "corda", "lora_ga", "loftq", "mica")
# The options of variants that have tensors or a training of their own.
VARIANTS = ("use_bdlora", "kasa_config", "monteclora_config", "velora_config")
_OPTIONS: Mapping[str, type] = {
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "use_bdlora": BdLoraConfig,
    "kasa_config": KasaConfig,
    "monteclora_config": MontecloraConfig,
    "velora_config": VeloraConfig,
    "arrow_config": ArrowConfig,
}


@dataclass
class LoraRuntimeConfig(Checked):
    """The options of LoRA that are not saved.

    Args:
        ephemeral_gpu_offload: accepted for peft's sake: computations on weights run where the weights are.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(TargetedConfig, peft_type=PeftType.LORA):
    """LoRA (Hu et al. 2021, arXiv:2106.09685): ``W' = W + scale * B A``.

    ``scale`` is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora`` (arXiv:2312.03732). Names,
    defaults and meaning are PEFT's, so a config written for it works here.

    Args, beside those of :class:`TargetedConfig`:
        r: the rank.
        lora_alpha: the numerator of the scale.
        lora_dropout: dropout on the adapter's input while training.
        rank_pattern: ``{pattern: r}`` for modules whose name ends with the pattern (a regular expression).
        alpha_pattern: the same for ``lora_alpha``.
        init_lora_weights: the start of training: ``True`` (A Kaiming-uniform, B zero), ``"gaussian"`` (A normal of
            deviation 1/r, B zero), ``"orthogonal"``, ``"pissa"``, ``"pissa_niter_[n]"``, ``"olora"``, ``"corda"``,
            ``"lora_ga"``, ``"eva"``, ``"loftq"``, ``"mica"``, or ``False`` (both random: a non-zero start, for tests).
        eva_config, corda_config, lora_ga_config, loftq_config: options of those starts.
        use_bdlora: a :class:`BdLoraConfig`, for factors that are block-diagonal.
        kasa_config: a :class:`KasaConfig`, for trained singular values on a weight that loses its smallest.
        monteclora_config: a :class:`MontecloraConfig`, for training under noise of a learned size.
        velora_config: a :class:`VeloraConfig`, for training that keeps less of a layer's input.
        layer_replication: the ranges of blocks, such as ``[[0, 4], [2, 5]]``, that the model consists of while it has
            the adapter; repeated blocks share the base's weights, and each has its own part of the adapter.
        use_qalora, qalora_group_size: QA-LoRA (arXiv:2309.14717): so many inputs of a layer share a column of A.
        ensure_weight_tying: adapt, or save whole, both embedding and output layer by one set of tensors where they
            share a weight and one of them is a target; a merge keeps them tied.
        alora_invocation_tokens: token ids; the adapter acts from their last occurrence in a prompt on (aLoRA), and
            on nothing where they do not occur.
        arrow_config: an :class:`~veneer.ArrowConfig`: the adapter routes tokens over others (Arrow).
    """

    r: int = 8
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] | None = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    velora_config: VeloraConfig | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | None = None
    layer_replication: list[list[int]] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: BdLoraConfig | None = None
    arrow_config: ArrowConfig | None = None
    kasa_config: KasaConfig | None = None
    ensure_weight_tying: bool = False
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)

    supported_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "megatron_config": (None,),
    }

    def __post_init__(self) -> None:
        for name, kind in _OPTIONS.items():
            options = getattr(self, name)
            # False is a switch that is off, in files of earlier versions.
            setattr(self, name, None if options is None or options is False else options_of(kind, options))
        if isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = dataclasses.asdict(self.loftq_config)
        if self.init_lora_weights == "loftq" and not self.loftq_config:
            self.loftq_config = dataclasses.asdict(LoftQConfig())  # peft wants them written out
        super().__post_init__()
        self.rank_pattern = dict(self.rank_pattern)
        self.alpha_pattern = dict(self.alpha_pattern)
        self._check()

    @property
    def method_name(self) -> str:
        return "ARROW" if self.arrow_config else super().method_name

    @property
    def experts(self) -> tuple[str, ...]:
        return self.arrow_config.experts if self.arrow_config else ()

    def _check(self) -> None:
        self._check_start()
        self._check_variant()
        if self.alora_invocation_tokens is not None and (self.use_dora or not self.alora_invocation_tokens):
            raise ConfigError(
                f"alora_invocation_tokens={self.alora_invocation_tokens!r} with use_dora={self.use_dora!r}.",
                hint="Give at least one token id, and leave DoRA off.",
            )
        if self.use_qalora and (self.qalora_group_size < 1 or self.init_lora_weights not in (True, False, "gaussian")):
            raise ConfigError(
                f"use_qalora with qalora_group_size={self.qalora_group_size!r} and "
                f"init_lora_weights={self.init_lora_weights!r}.",
                hint='The size is at least 1, and the start True, False or "gaussian".',
            )
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": r for key, r in self.rank_pattern.items()}}
        for name, rank in ranks.items():
            if rank < 1:
                raise ConfigError(
                    f"{name}={rank!r} is no rank: `r` should be a positive integer value but the value passed is "
                    f"{rank!r}.",
                    hint="The default is 8.",
                )
        check_share(self, "lora_dropout")

    def _check_variant(self) -> None:
        names = (*VARIANTS, "use_dora", "alora_invocation_tokens", "use_qalora", "arrow_config")
        chosen = [name for name in names if getattr(self, name) not in (None, False)]
        if len(chosen) > 1 and chosen[0] in VARIANTS:
            options = ", ".join(f"{name}={getattr(self, name)!r}" for name in chosen)
            raise ConfigError(
                f"{options}: variants of LoRA have options, and exclude each other.",
                hint="Choose one, with its options: use_bdlora=BdLoraConfig(...), kasa_config=KasaConfig() ...",
            )
        if self.use_dora and self.megatron_config:
            raise ConfigError("DoRA does not support megatron_core.", hint="Set use_dora=False.")
        if self.use_bdlora and self.lora_bias:
            raise ConfigError("use_bdlora with lora_bias.", hint="A block-diagonal B has no bias; leave lora_bias off.")

    def _check_start(self) -> None:
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()
        for name in ("eva", "corda", "lora_ga"):
            if getattr(self, f"{name}_config") is not None and self.init_lora_weights != name:
                warn(f"`{name}_config` specified but will be ignored when `init_lora_weights` is not '{name}'.")
        start = self.init_lora_weights
        if isinstance(start, str) and start not in STARTS and not re.fullmatch(r"pissa_niter_\d+", start):
            raise ConfigError(
                f"init_lora_weights={start!r} is no starting point.",
                hint=did_you_mean(start, STARTS) + f"Known: True, False, {', '.join(STARTS)}.",
            )
