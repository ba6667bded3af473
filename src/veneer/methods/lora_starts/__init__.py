"""Starting points of LoRA: one file for each name that ``init_lora_weights`` takes.

Each returns the ``A`` and ``B`` that training begins from. Moved ones begin with ``B A`` other than zero, which
is subtracted from the weight, so that a new adapter changes nothing: ``W' = W + scale * (B A - B_0 A_0)``. The base
itself is never changed; the start is kept beside the adapter, and saved within it (:mod:`veneer.methods.lora`).
"""

from __future__ import annotations

import importlib

from torch import Tensor, nn

from veneer.configs.lora_start_options import is_moved
from veneer.methods.lora_starts.start import StartLayer
from veneer.methods.lora_starts.statistics import COVARIANCE, is_recorded

__all__ = ["StartLayer", "begin", "can_be_repeated", "is_by_chance", "repeats"]


def repeats(how: object) -> bool:
    """Tell whether a moved start can be computed again from the base alone, without data and without chance."""
    return how in ("pissa", "olora")


def is_by_chance(how: object) -> bool:
    """Tell whether a moved start is another each time, so that it cannot be computed again."""
    return is_moved(how) and not repeats(how) and how != "corda"


def can_be_repeated(how: object, module: nn.Module) -> bool:
    """Tell whether the moved start of a layer can be computed again, from data where these were measured on it."""
    return repeats(how) or (how == "corda" and is_recorded(COVARIANCE, module))


def begin(layer: StartLayer) -> tuple[Tensor, Tensor]:
    """Return ``A``, shape ``(r, in)``, and ``B``, shape ``(out, r)``, of a new adapter on ``layer``.

    Raises:
        ConfigError: the rank does not fit, or data are missing.
    """
    module = importlib.import_module(f"veneer.methods.lora_starts.{layer.how.partition('_niter_')[0]}")
    down, up = module.start(layer)
    return down.contiguous(), up.contiguous()
