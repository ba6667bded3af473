"""The options of Arrow routing, which stand in a LoRA's config as ``arrow_config``."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.value_checks import Checked
from veneer.errors import ConfigError


@dataclass
class ArrowConfig(Checked):
    """Arrow (Ostapenko et al. 2024, arXiv:2405.11157): each token goes to the LoRAs that would change it most.

    Args:
        top_k: how many LoRAs a token goes to.
        router_temperature: of the softmax over those; lower is sharper.
        use_gks: whether the mean of the general adapters is subtracted from the others first (GenKnowSub,
            Bagherifard et al. 2025, ACL short papers 54).
        rng_seed: kept for peft's files. Directions are computed exactly here, without chance.
        task_adapter_names: the adapters that tokens go to; ``create_arrow_model`` fills it in.
        gks_adapter_names: the general ones; filled in too.
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    rng_seed: int | None = None
    task_adapter_names: list[str] | None = None
    gks_adapter_names: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} is too small.", hint="It is at least 1.")
        if self.router_temperature <= 0:
            raise ConfigError(f"router_temperature={self.router_temperature} is not positive.", hint="Use 1.0.")
        if self.use_gks and self.task_adapter_names and not self.gks_adapter_names:
            raise ConfigError("use_gks needs general adapters, and there are none.", hint="Name some, or turn it off.")

    @property
    def experts(self) -> tuple[str, ...]:
        """The adapters that take part."""
        return (*(self.task_adapter_names or ()), *((self.gks_adapter_names or ()) if self.use_gks else ()))
