"""The config of PSOFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_share
from veneer.errors import ConfigError
from veneer.printing import warn


@dataclass
class PsoftConfig(TargetedConfig, peft_type=PeftType.PSOFT):
    """PSOFT (ICLR 2026): a turn within the base's own principal subspace.

    Args, beside those of :class:`TargetedConfig`:
        r: the dimension of the subspace.
        psoft_alpha: divides the singular values before the turn and multiplies the change after it, over ``r``.
        psoft_dropout: dropout on the adapter's input while training.
        ab_svd_init: where the singular values go: ``"psoft_init"`` (all to the left) or ``"pissa_init"`` (halves).
        psoft_svd: ``"full"``, or ``"lowrank"``, faster and inexact.
        psoft_svd_lowrank_niter: steps of ``"lowrank"``.
        random_seed: the seed of ``"lowrank"``.
        psoft_orth: whether the turn is orthogonal; else any matrix.
        psoft_mag_b, psoft_mag_a: whether a trained scale follows and precedes it.
        use_cayley_neumann: approximate the turn by a series.
        num_cayley_neumann_terms: the series' length.
        cayley_neumann_eps: bound on the generator's norm in the series.
    """

    r: int = 32
    psoft_alpha: int = 32
    psoft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r", "psoft_alpha")
        check_share(self, "psoft_dropout")
        if self.num_cayley_neumann_terms < 1:
            raise ConfigError(
                f"`num_cayley_neumann_terms` must be a positive integer, and is {self.num_cayley_neumann_terms}.",
                hint="The default is 5.",
            )
        eps = self.cayley_neumann_eps
        if self.use_cayley_neumann and eps is not None and not 0 < eps < 1:
            raise ConfigError(f"`cayley_neumann_eps` must be in (0, 1), and is {eps!r}.", hint="None is no bound.")
        for name, needed, used in (
            ("psoft_svd_lowrank_niter", "psoft_svd='lowrank'", self.psoft_svd == "lowrank"),
            ("num_cayley_neumann_terms", "use_cayley_neumann=True", self.use_cayley_neumann),
            ("cayley_neumann_eps", "use_cayley_neumann=True", self.use_cayley_neumann),
        ):
            if not used and getattr(self, name) != getattr(type(self), name):
                warn(f"`{name}` is only used when `{needed}`.")
