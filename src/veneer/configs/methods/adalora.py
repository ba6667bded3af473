"""The config of AdaLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from veneer.configs.base import TargetedConfig
from veneer.configs.methods.lora import LoraRuntimeConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_share
from veneer.errors import ConfigError, UnsupportedError
from veneer.printing import warn

# Options of LoRA that an AdaLoRA does not have.
_ALWAYS_NONE = (
    *("megatron_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "arrow_config"),
    *("alora_invocation_tokens", "monteclora_config", "layer_replication", "use_bdlora", "kasa_config"),
)


@dataclass
class AdaLoraConfig(TargetedConfig, peft_type=PeftType.ADALORA):
    """AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): a LoRA whose ranks are given to the layers that need them.

    Args, beside those of :class:`TargetedConfig`:
        init_r: the rank that every layer starts with.
        target_r: the mean rank that is left at the end of ``total_step`` steps.
        tinit: steps before ranks are taken away.
        tfinal: steps at the end in which no rank is taken away.
        deltaT: steps between two choices of ranks.
        beta1, beta2: the decays of the running means of an entry's importance, and of its uncertainty.
        orth_reg_weight: the weight in the loss of how far the factors are from orthogonal.
        total_step: the number of training steps.
        lora_alpha: the numerator of the scale; the denominator is ``init_r``.
        lora_dropout: dropout on the adapter's input while training.
        rank_pattern: name of a layer's ``lora_E`` -> which of its ranks remain; written by training.
        bias: ``"none"``, ``"lora_only"`` or ``"all"``: the biases that are trained too.
        init_lora_weights: ``True`` starts without effect, ``False`` at random.
    """

    r: int = 8
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    # LoRA's other options, which peft writes into the config of an AdaLoRA too.
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    use_rslora: bool = False
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    use_dora: bool = False
    qalora_group_size: int = 16
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    megatron_config: dict[str, Any] | None = None
    loftq_config: dict[str, Any] | None = field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[list[int]] | None = None
    use_bdlora: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)

    tensor_head = "lora"
    supported_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "trainable_token_indices": (None,),
        "use_dora": (False, None),
        "lora_bias": (False, None),
        "target_parameters": (None, []),
        "use_qalora": (False, None),
        "ensure_weight_tying": (False, None),
        "loftq_config": (None, {}),
        **dict.fromkeys(_ALWAYS_NONE, (None,)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, used in {"DoRA": self.use_dora, "LOFTQ": self.init_lora_weights == "loftq"}.items():
            if used:
                raise UnsupportedError(f"ADALORA does not support {name}.", hint="Leave it out, or use LoRA.")
        if self.orth_reg_weight < 0:
            raise ConfigError(
                "`orth_reg_weight` should be greater than or equal to 0, but the value passed is "
                f"{self.orth_reg_weight!r}.",
                hint="0 switches the regularisation off; the default is 0.5.",
            )
        check_at_least_one(self, "init_r", "target_r", "deltaT")
        check_share(self, "lora_dropout", "beta1", "beta2")
        if self.r != type(self).r:
            warn(
                f"Note that `r` is not used in AdaLora and will be ignored. r={self.r} is given: see init_r, target_r."
            )
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                f"The supplied schedule values don't allow for a budgeting phase: total_step={self.total_step} leaves "
                f"no step between tinit={self.tinit} and tfinal={self.tfinal}.",
                hint="Ranks are taken away between the two: make one of them smaller, or total_step larger.",
            )
