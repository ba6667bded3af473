"""Chooses a LoRA's targets by the condition numbers of the base's weights (KappaTune, arXiv:2506.16289).

The condition number of a weight is its largest singular value over its smallest. Weights of low ones are those that
training disturbs least: they come first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from veneer.errors import UsageError
from veneer.keywords import strict, takes
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.printing import progress

# Endings of the names of parameters that hold the weights of all experts of a layer, shape (experts, m, n).
EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


@strict
class KappaTuneSelector:
    """Ranks the linear layers and the fused experts of a base model by their condition numbers.

    Args:
        model: the base model.
        max_dim_size_to_analyze: leave out weights with a side longer than this.
        moe_param_suffixes: endings of the names of fused experts; transformers' own when ``None``.
        show_progress: show progress on the terminal.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = EXPERTS if moe_param_suffixes is None else tuple(moe_param_suffixes)
        self.show_progress = show_progress
        self._layers: dict[str, float] | None = None
        self._parameters: dict[str, float] | None = None

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return the names of linear layers, those of the lowest condition numbers first.

        Args:
            top_p: this share of them, at least one.
            num_modules: instead, so many.
            threshold: instead, those up to this condition number.
        """
        if self._layers is None:
            self._layers = dict(self._of_layers())
        return _lowest(self._layers, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return the same of fused experts, whose condition number is the mean of the experts'."""
        if self._parameters is None:
            self._parameters = dict(self._of_experts())
        return _lowest(self._parameters, top_p, num_modules, threshold)

    def _of_layers(self) -> Iterator[tuple[str, float]]:
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}
        with progress("condition numbers", self.show_progress):
            for name, layer in layers.items():
                wrapper = self.model.get_submodule(name.rpartition(".")[0])
                name = name.removesuffix(".base_layer") if isinstance(wrapper, AdaptedLayer) else name
                if layer.weight.is_floating_point() and self._is_small(layer.weight):
                    yield name, _condition(layer.weight)

    def _of_experts(self) -> Iterator[tuple[str, float]]:
        with progress("condition numbers", self.show_progress):
            for name, parameter in self.model.named_parameters():
                if parameter.ndim == 3 and name.endswith(self.moe_param_suffixes) and self._is_small(parameter[0]):
                    numbers = [_condition(expert) for expert in parameter]
                    yield name, sum(numbers) / len(numbers)

    def _is_small(self, weight: Tensor) -> bool:
        return max(weight.shape) <= self.max_dim_size_to_analyze


@takes()
def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """Return ``target_modules`` and ``target_parameters`` for a LoRA: the weights of the lowest condition numbers.

    Args:
        model: the base model.
        top_p: the share of linear layers, and of fused experts, that is chosen: over 0 and up to 1.
        max_dim_size_to_analyze: leave out weights with a side longer than this.
        moe_param_suffixes: endings of the names of fused experts; transformers' own when ``None``.
        show_progress: show progress on the terminal; large models take minutes.

    Returns:
        The names under both keys; ``target_parameters`` is ``None`` for a model without fused experts.

    Raises:
        UsageError: ``top_p`` is out of its range.
    """
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p={top_p} does not lie over 0 and up to 1.", hint="Give the share of layers to adapt.")
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    parameters = selector.get_best_target_parameters(top_p=top_p)
    return {"target_modules": selector.get_best_targets(top_p=top_p), "target_parameters": parameters or None}


@torch.no_grad()
def _condition(weight: Tensor) -> float:
    values = torch.linalg.svdvals(weight.float())
    return float(values[0] / values[-1])


def _lowest(
    numbers: dict[str, float], top_p: float | None, num_modules: int | None, threshold: float | None
) -> list[str]:
    ranked = sorted(numbers, key=numbers.__getitem__)
    if num_modules is not None:
        return ranked[:num_modules]
    if threshold is not None:
        return [name for name in ranked if numbers[name] <= threshold]
    return ranked if top_p is None else ranked[: max(1, int(len(ranked) * top_p))]
