"""The options of LoRA's starts: ``eva_config``, ``loftq_config`` and so on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from veneer.configs.value_checks import Checked
from veneer.errors import ConfigError, ConfigTypeError, UnknownKeyError, did_you_mean

StartT = TypeVar("StartT")

_MOVED = frozenset({"corda", "lora_ga", "olora", "pissa"})


def is_moved(how: object) -> bool:
    """Tell whether a start is taken off the base's weight, so that a new adapter changes nothing."""
    return isinstance(how, str) and how.partition("_niter_")[0] in _MOVED


@dataclass
class CordaConfig(Checked):
    """CorDA.

    Args:
        corda_method: "ipm" adapts to the data given, "kpm" preserves the knowledge that the data ask for.
        covariance_file, cache_file: a safetensors file for what ``preprocess_corda`` measures: read if it is there,
            else written.
        verbose, use_float16_for_covariance, prune_temporary_fields: accepted for peft's sake: nothing is printed, and
            measuring is in float32.
    """

    cache_file: str | Path | None = None
    covariance_file: str | Path | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        for name in ("cache_file", "covariance_file"):
            file = getattr(self, name)
            setattr(self, name, None if file is None else os.fspath(file))
        super().__post_init__()


@dataclass
class LoraGAConfig(Checked):
    """LoRA-GA.

    Args:
        direction: which of the gradient's first 2r directions are A's and which B's: alternating ("ArBr"), A the
            second half ("A2rBr"), A the first ("ArB2r"), or r of them for both ("random").
        scale: the norm of B: "stable" (by ``stable_gamma``), "weight_svd" (as the weight's largest direction),
            "gd_scale" (one step of descent), "unit" (as it is).
        stable_gamma: a larger one makes B shorter.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16


@dataclass
class EvaConfig(Checked):
    """EVA.

    Args:
        rho: a layer gets this many times its rank at most; 1.0 leaves all ranks as they are.
        tau: directions have converged when the cosine between two steps is as large as this.
        use_label_mask: leave out tokens whose label is ``label_mask_value``.
        label_mask_value: the label of ``use_label_mask``.
        whiten: divide each direction by the root of its singular value.
        adjust_scaling_factors: multiply a layer's ``lora_alpha`` as its rank, so that the scale stays.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rho >= 1:
            raise ConfigError(f"EvaConfig: `rho` must be >= 1.0, and is {self.rho!r}.", hint="The default is 2.0.")
        if not 0 <= self.tau < 1:
            raise ConfigError(f"EvaConfig: `tau` must be between 0.0 and 1.0. It is {self.tau!r}.", hint="Use 0.99.")


@dataclass
class LoftQConfig(Checked):
    """LoftQ.

    Args:
        loftq_bits: 4 (NormalFloats, blocks of 64) or 8 (whole numbers, a scale a row).
        loftq_iter: how often quantising and fitting the LoRA to its error alternate.
    """

    loftq_bits: Literal[4, 8] = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loftq_iter < 1:
            raise ConfigError(f"LoftQConfig: loftq_iter={self.loftq_iter!r}.", hint="It is at least 1.")


def options_of(kind: type[StartT], values: StartT | Mapping[str, Any] | None) -> StartT:
    """Return options, or make them from the ``values`` in a file.

    Unknown keys of a start are left to other tools, for its arithmetic is over; those of a variant are refused.

    Raises:
        UnknownKeyError: a key of a variant is unknown. ConfigTypeError: the values are no dictionary.
    """
    if isinstance(values, kind):
        return values
    if values is not None and not isinstance(values, Mapping):
        raise ConfigTypeError(
            f"{values!r}: `{kind.__name__}` must be a `{kind.__name__}`, a dict, or None.",
            hint=f"Give {kind.__name__}(...).",
        )
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = [str(key) for key in values or () if key not in known]
    if unknown and kind.__module__ != __name__:
        raise UnknownKeyError(
            f"{kind.__name__} has no option {unknown[0]!r}.",
            hint=did_you_mean(unknown[0], known) + f"It has {', '.join(sorted(known))}.",
        )
    return kind(**{key: value for key, value in (values or {}).items() if key in known})
