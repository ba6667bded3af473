"""CorDA: begin from the directions that matter for given data (Yang et al. 2024, arXiv:2406.05223, section 3).

    W C = U S V^T        scale * B A = U_r S_r (V^T C^-1)_r        C: the covariance of the layer's input, (in, in)

``corda_method`` "ipm" takes the largest values (to learn from the data), "kpm" the smallest (to keep the knowledge that
the data call on).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.configs.lora_start_options import CordaConfig
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import ConfigError
from veneer.keywords import takes
from veneer.methods.lora_starts.start import StartLayer
from veneer.methods.lora_starts.statistics import COVARIANCE, read, record, recorded, sites_to_measure, watching, write
from veneer.patches.low_rank import balanced

# The largest distance of C times its computed inverse from the identity.
_INVERSE_ERROR = 0.05


def start(layer: StartLayer) -> tuple[Tensor, Tensor]:
    """Return ``A`` and ``B``."""
    layer.check_rank()
    options = layer.options or CordaConfig()
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
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Measure the data for ``init_lora_weights="corda"``; call it before ``get_peft_model``.

    Args:
        model: the base model.
        lora_config: selects the layers that are measured.
        run_model: runs the model on the sample data: a few hundred texts of what is to be learnt or kept. It can be
            left out where a ``covariance_file`` or ``cache_file`` of the config holds what was measured before.
        hooked_model: the model that ``run_model`` calls, if it is another object with the same modules' names.

    Raises:
        ConfigError: a layer saw no data, or values that are not finite; there is neither data nor such a file; or the
            config is of another start.
    """
    sites = sites_to_measure(model, lora_config, "preprocess_corda", "corda")
    layers = {name: site.module for name, site in sites.items()}
    options = lora_config.corda_config or CordaConfig()
    files = [Path(file) for file in (options.covariance_file, options.cache_file) if file]
    measured = next((file for file in files if file.is_file()), None)
    covariances = _measure(hooked_model or model, layers, run_model) if measured is None else read(measured, layers)
    for file in files if measured is None else ():
        write(file, covariances)
    for name, module in layers.items():
        record(COVARIANCE, module, covariances[name])


def _measure(
    model: nn.Module, layers: Mapping[str, nn.Module], run_model: Callable[[], Any] | None
) -> dict[str, Tensor]:
    """Return the covariance of the input of each layer while ``run_model`` runs the model."""
    if run_model is None:
        raise ConfigError(
            "preprocess_corda: `run_model` must be specified when covariance file and cache file aren't built.",
            hint="Give a function that runs the model on sample data.",
        )
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, x: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        rows = rows / rows.max().abs()
        sums[name] = rows.T @ rows + sums.get(name, 0)
        counts[name] = counts.get(name, 0) + 1

    watched = {name: model.get_submodule(name) for name in layers}
    was_training = model.training
    model.eval()
    try:
        with watching(watched, see):
            run_model()
    finally:
        model.train(was_training)
    for name in layers:
        if name not in sums or not bool(torch.isfinite(sums[name]).all()):
            raise ConfigError(
                f"preprocess_corda: {name} saw no data, or values that are not finite.",
                hint="Let run_model call this model on tokens, or leave the layer out with exclude_modules.",
            )
    return {name: total / counts[name] for name, total in sums.items()}
