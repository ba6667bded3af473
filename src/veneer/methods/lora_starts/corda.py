"""CorDA: begin from the directions that matter for given data (Yang et al. 2024, arXiv:2406.05223, section 3).

    W C = U S V^T        scale * B A = U_r S_r (V^T C^-1)_r        C: the covariance of the layer's input, (in, in)

``corda_method`` "ipm" takes the largest values (to learn from the data), "kpm" the smallest (to keep the knowledge that
the data call on).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.configs.lora_start_options import CordaConfig, options_of
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import ConfigError
from veneer.keywords import takes
from veneer.methods.lora_starts.start import StartLayer
from veneer.methods.lora_starts.statistics import COVARIANCE, linear_layers, record, recorded, watching
from veneer.patches.low_rank import balanced

# The largest distance of C times its computed inverse from the identity.
_INVERSE_ERROR = 0.05


def start(layer: StartLayer) -> tuple[Tensor, Tensor]:
    """Return ``A`` and ``B``."""
    layer.check_rank()
    options = options_of(CordaConfig, layer.options)
    covariance = recorded(COVARIANCE, layer.module, f'{layer.name}: init_lora_weights="corda"', "preprocess_corda(...)")
    damped, inverse = _damped(covariance.to(layer.weight))
    left, values, right = torch.linalg.svd(layer.weight @ damped, full_matrices=False)
    part = slice(None, layer.r) if options.corda_method == "ipm" else slice(-layer.r, None)
    up, down = balanced(left[:, part], values[part], (right @ inverse)[part], layer.scale)
    return down, up


def _damped(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the covariance with enough added to its diagonal to have an inverse, and that inverse."""
    identity = torch.eye(covariance.shape[0], device=covariance.device)
    damp = 0.01
    while True:
        damped = covariance + identity * covariance.diagonal().mean() * damp
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity) < _INVERSE_ERROR:
            return damped, inverse
        damp *= 2


@torch.no_grad()
@takes()
def preprocess_corda(model: nn.Module, lora_config: LoraConfig, run_model: Callable[[], Any]) -> None:
    """Measure the data for ``init_lora_weights="corda"``; call it before ``get_peft_model``.

    Args:
        model: the base model.
        lora_config: selects the layers that are measured.
        run_model: runs the model on the sample data: a few hundred texts of what is to be learnt or kept.

    Raises:
        ConfigError: a layer saw no data, or values that are not finite.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, x: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        rows = rows / rows.max().abs()
        sums[name] = rows.T @ rows + sums.get(name, 0)
        counts[name] = counts.get(name, 0) + 1

    layers = linear_layers(model, lora_config)
    was_training = model.training
    model.eval()
    try:
        with watching(layers, see):
            run_model()
    finally:
        model.train(was_training)
    for name, module in layers.items():
        if name not in sums or not bool(torch.isfinite(sums[name]).all()):
            raise ConfigError(
                f"preprocess_corda: {name} saw no data, or values that are not finite.",
                hint="Let run_model call this model on tokens, or leave the layer out with exclude_modules.",
            )
        record(COVARIANCE, module, sums[name] / counts[name])
