"""LoRA-GA: begin where the first step of full fine-tuning points (Wang et al. 2024, arXiv:2407.05000, section 3).

    G = U S V^T, the gradient of the weight        A: r rows of V^T, B: r other columns of U S

``direction`` deals the first 2r of them to A and B; ``scale`` sets the length of B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base_model.sites.site import Site
from veneer.configs.lora_start_options import LoraGAConfig, options_of
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import ConfigError, UnsupportedError
from veneer.keywords import takes
from veneer.methods.lora_starts.start import StartLayer
from veneer.methods.lora_starts.statistics import GRADIENT, read, record, recorded, sites_to_measure, write


def start(layer: StartLayer) -> tuple[Tensor, Tensor]:
    """Return ``A`` and ``B``."""
    layer.check_rank(min(layer.weight.shape) // 2)
    options = options_of(LoraGAConfig, layer.options)
    gradient = recorded(GRADIENT, layer.module, f'{layer.name}: init_lora_weights="lora_ga"', "preprocess_loraga(...)")
    gradient = gradient.to(layer.weight)
    r = layer.r
    with layer.seeded():
        up, values, columns = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
        for_down, for_up = _directions(options.direction, r)
        down, up, values = columns.T[for_down], up[:, for_up] * values[for_up], values[for_up]
        return _scaled(layer, options, down, up, values)


def _directions(direction: str, r: int) -> tuple[Tensor, Tensor]:
    """Return the indices, among the first 2r directions, of ``A``'s and of ``B``'s."""
    order = torch.arange(2 * r)
    if direction == "ArBr":
        return order[1::2], order[0::2]
    if direction == "A2rBr":
        return order[r:], order[:r]
    if direction == "ArB2r":
        return order[:r], order[r:]
    chosen = torch.randperm(2 * r)[:r]
    return chosen, chosen


def _scaled(
    layer: StartLayer, options: LoraGAConfig, down: Tensor, up: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    if options.scale == "stable":
        return down, up * (layer.weight.shape[0] ** 0.25 / options.stable_gamma**0.5)
    if options.scale == "weight_svd":
        _, of_weight, _ = torch.svd_lowrank(layer.weight, q=layer.r, niter=4)
        longest = values.max()  # "random" takes them in any order
        return down, up * (of_weight[0] / longest) if longest > 0 else up
    if options.scale == "gd_scale":
        return down / layer.scale, up / layer.scale
    return down, up


@takes()
def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], Any],
    cache_file: str | Path | None = None,
) -> None:
    """Measure the gradients for ``init_lora_weights="lora_ga"``; call it before ``get_peft_model``.

    Args:
        model: the base model; afterwards it is as it was.
        lora_config: selects the layers that are measured.
        train_step: runs forward and backward passes on a few batches of the training data.
        cache_file: a safetensors file for the gradients: read if it is there, instead of measuring; else written.

    Raises:
        ConfigError: a layer got no gradient, the file is of other layers, or the config is of another start.
        UnsupportedError: a layer is quantised.
    """
    sites = sites_to_measure(model, lora_config, "preprocess_loraga", "lora_ga")
    file = None if cache_file is None else Path(cache_file)
    if file is not None and file.is_file():
        gradients = read(file, sites)
    else:
        gradients = _measure(model, sites, train_step)
        if file is not None:
            write(file, gradients)
    for name, site in sites.items():
        record(GRADIENT, site.module, gradients[name])


def _measure(model: nn.Module, sites: Mapping[str, Site], train_step: Callable[[], Any]) -> dict[str, Tensor]:
    """Return the mean gradient of the weight of each layer over the passes of ``train_step``."""
    for name, site in sites.items():
        if site.is_packed:
            raise UnsupportedError(
                f"preprocess_loraga: the weight of {name} is quantized, and gets no gradient.",
                hint="Measure on the base before it is quantised, with cache_file=..., or leave the layer out.",
            )
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    counts = dict.fromkeys(sites, 0)
    model.requires_grad_(False)
    handles = []
    was_training = model.training
    try:
        for name, site in sites.items():
            site.stored.requires_grad_(True)
            handles.append(site.stored.register_post_accumulate_grad_hook(_counter(counts, name)))
        model.train()
        with torch.enable_grad():
            train_step()
        return {name: _mean_gradient(name, site, counts[name]) for name, site in sites.items()}
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
        for site in sites.values():
            site.stored.grad = None
        model.train(was_training)


def _mean_gradient(name: str, site: Site, count: int) -> Tensor:
    if not count or site.stored.grad is None:
        raise ConfigError(
            f"preprocess_loraga: {name} got no gradient.",
            hint="Let train_step call backward() on a loss of this model.",
        )
    return site.canonical(site.stored.grad.detach()) / count


def _counter(counts: dict[str, int], name: str) -> Callable[[Tensor], None]:
    def count(_: Tensor) -> None:
        counts[name] += 1

    return count
