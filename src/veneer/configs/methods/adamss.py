"""The config of AdaMSS."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_choice
from veneer.errors import ConfigError


@dataclass
class AdamssConfig(TargetedConfig, peft_type=PeftType.ADAMSS):
    """AdaMSS (Zheng et al. 2025, NeurIPS): a low rank for each group of alike rows, along the weight's own directions.

    It needs the package scikit-learn, which finds the groups.

    Args, beside those of :class:`TargetedConfig`:
        r: how many right singular vectors of a weight are used.
        num_subspaces: how many groups a weight's rows are put into.
        subspace_rank: the rank of a group.
        init_weights: ``"orthogonal"`` (A within the group's directions, B zero); ``None`` or ``False`` for a random B.
        use_dynamic_rank: whether a group's rank may be lower: the number of its large singular values.
        svd_threshold: a singular value is large if its square is more than this share of the largest's.
        random_seed: of the decomposition, which is worked out again when the adapter is loaded.
        use_asa: whether ``model.update_and_allocate(step)`` freezes the groups that matter least.
        asa_target_subspaces: how many groups of all layers together are trained in the end.
        init_warmup: the step from which groups are frozen.
        final_warmup: the step from which no more groups are frozen.
        mask_interval: steps between two choices.
        asa_importance_beta: the decay of the running mean of a tensor's importance.
        asa_uncertainty_beta: the decay of the running mean of the importance's distance from its mean.
        asa_schedule_exponent: with a larger one, more groups are frozen early.
    """

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    init_weights: str | bool | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r", "num_subspaces", "subspace_rank")
        if self.init_weights is False:
            self.init_weights = None
        check_choice(self, "init_weights", "orthogonal", None)
        if self.use_asa:
            self._check_schedule()

    def _check_schedule(self) -> None:
        kinds = {"mask_interval": "integer", "asa_target_subspaces": "integer", "asa_schedule_exponent": "number"}
        for name, kind in kinds.items():
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"`{name}` must be a positive {kind} when `use_asa=True`, got {getattr(self, name)!r}.",
                    hint=f"The default is {getattr(type(self), name)!r}.",
                )
        if self.init_warmup >= self.final_warmup:
            raise ConfigError(
                f"`init_warmup` must be smaller than `final_warmup` when `use_asa=True`: no step is left between "
                f"init_warmup={self.init_warmup} and final_warmup={self.final_warmup}.",
                hint="Groups are frozen between the two.",
            )
