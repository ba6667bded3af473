"""Combines several adapters into one: a plain LoRA adapter that any tool loads.

With ``D_i = W_i' - W`` the change that adapter ``i`` makes to a layer's weight, and ``w_i`` the adapter's weight:

    cat                 sum of w_i D_i, exactly; the ranks add up
    linear              the same, in the smallest rank that holds it
    svd                 the matrix of rank r that is nearest to it
    magnitude_prune     sum of w_i keep(D_i), where keep leaves the share ``density`` of largest magnitude
    dare_linear         sum of w_i drop(D_i) / density, where drop leaves each value with probability ``density``
                        (Yu et al. 2023, arXiv:2311.03099, equation 4)
    ties                elect(w_i keep(D_i)), where elect takes the sign that prevails for each value, and the mean of
                        the values that have it (Yadav et al. 2023, arXiv:2306.01708, section 3)
    dare_ties           elect(w_i drop(D_i) / density)

Pruning and election work on whole changes, as in their papers, and the result is then brought to rank ``r``. Applied to
the factors, as some tools do, they would add products of one adapter's A with another's B.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.collection import Adapters
from veneer.adapters.merge.in_memory import check_mergeable
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import AdapterError, UnsupportedError, UsageError
from veneer.files.tensor_keys import encode
from veneer.layers.adapter_shares import LayerAdapters
from veneer.layers.weight_change import change_of
from veneer.methods.lora import B_BIAS
from veneer.patches.low_rank import truncated, truncated_product

EXACT = ("cat", "linear")
ON_FACTORS = (*EXACT, "svd")
RANDOM = ("dare_linear", "dare_ties")
ELECTING = ("ties", "dare_ties")
ON_CHANGES = ("magnitude_prune", "dare_linear", *ELECTING)


@dataclass(frozen=True)
class Combination:
    """Names the adapters to combine, and how.

    Attributes:
        names: the adapters.
        weights: one for each; negative ones take an adapter's change away.
        kind: a name in the table above; from ``magnitude_prune`` on it may end in ``_svd``, as in peft.
        rank: of the result; the largest of the adapters' ranks when ``None``, and for ``cat`` and ``linear`` their sum.
            A float is the share of each layer's change, as a sum of squares, that its own rank has to hold.
        density: the share of values that pruning leaves, over 0 and up to 1.
        sign: how ``ties`` weighs the signs: "total" by the values' sum, "frequency" by their number.
        seed: of what DARE drops; torch's own generator when ``None``.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    kind: str = "svd"
    rank: float | None = None
    density: float | None = None
    sign: str = "total"
    seed: int | None = None

    def __post_init__(self) -> None:
        kinds = (*ON_FACTORS, *ON_CHANGES, *(f"{kind}_svd" for kind in ON_CHANGES))
        if self.kind not in kinds:
            raise UsageError(f"Unknown combination_type {self.kind!r}.", hint=f"Known: {', '.join(kinds)}.")
        if not self.names or len(self.names) != len(self.weights):
            raise UsageError(
                f"{len(self.names)} adapters and {len(self.weights)} weights.", hint="Give one weight for each adapter."
            )
        check_rank("svd_rank", self.rank)
        if self.sign not in ("total", "frequency"):
            raise UsageError(f"Unknown majority_sign_method {self.sign!r}.", hint="Known: total, frequency.")
        if self.kind not in ON_FACTORS and not 0 < (self.density or 0) <= 1:
            raise UsageError(
                f"{self.kind} needs density, the share of values that it leaves; it is {self.density!r}.",
                hint="Give a number over 0 and up to 1, such as 0.5.",
            )


def check_rank(option: str, rank: float | None) -> None:
    """Raise ``UsageError`` where an option is neither a rank nor a share of a change."""
    if rank is not None and not (0 < rank <= 1 if isinstance(rank, float) else rank >= 1):
        raise UsageError(
            f"{option}={rank!r} is no rank.",
            hint="A rank is a whole number of at least 1, or the share of each change to be held, up to 1.0.",
        )


@torch.no_grad()
def combine(adapters: Adapters, combination: Combination) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return the config and the tensors (checkpoint key -> float32 tensor) of a combination of a model's adapters.

    Args:
        adapters: those of the model.
        combination: which, and how. What one of them brings whole comes along as it is.

    Raises:
        UnknownAdapterError: one of the adapters is not there.
        MergeError: one is a prompt.
        UnsupportedError: two bring the same module whole, or one changes something that LoRA cannot hold.
    """
    entries = [adapters.get(name) for name in dict.fromkeys(combination.names)]
    check_mergeable(adapters, combination.names)
    modules, whole = _whole_modules(entries)
    generator = None if combination.seed is None else torch.Generator().manual_seed(combination.seed)
    layers = [layer for name, layer in adapters.layers.items() if any(name in entry.layers.by_id for entry in entries)]
    combined = [(layer, *_combined(layer, combination, generator)) for layer in layers]
    ranks = {layer.site.pattern_name: up.shape[-1] for layer, up, _, _ in combined}
    rank = max(ranks.values(), default=0)
    if not rank:
        raise AdapterError(f"{', '.join(combination.names)} change no layer.", hint="Load adapters that were trained.")
    biased, own_ranks = any(shift is not None for *_, shift in combined), isinstance(combination.rank, float)
    tensors = {}
    for layer, up, down, shift in combined:
        if not own_ranks:
            up, down = _padded(up, rank, -1), _padded(down, rank, -2)
        leaves = layer.site.as_low_rank(up, down)
        if biased:
            leaves[B_BIAS] = torch.zeros(layer.site.shape[0]) if shift is None else shift
        tensors.update({encode(layer.site.key, leaf): tensor.contiguous() for leaf, tensor in leaves.items()})
    tensors.update(whole)
    config = replace(_config(adapters, entries[0].config.task_type, layers, biased), modules_to_save=modules)
    if own_ranks:
        return replace(config, r=1, lora_alpha=1, rank_pattern=ranks, alpha_pattern=dict(ranks)), tensors
    return replace(config, r=rank, lora_alpha=rank), tensors


def _whole_modules(entries: Sequence[Adapter]) -> tuple[list[str] | None, dict[str, Tensor]]:
    """Return the names in configs, and the tensors by checkpoint key, of the modules that adapters bring whole."""
    owners = [entry for entry in entries if entry.whole_modules.names]
    counts = Counter(root for entry in owners for root in entry.whole_modules.names)
    shared = [root for root, count in counts.items() if count > 1]
    if shared:
        raise UnsupportedError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s). No weighting of {', '.join(shared)} is defined.",
            hint="Combine adapters of which one at most brings it.",
        )
    names = dict.fromkeys(name for entry in owners for name in getattr(entry.config, "modules_to_save", None) or ())
    tensors = [named for entry in owners for named in entry.whole_modules.named_tensors(entry, torch.clone)]
    return list(names) or None, dict(tensors)


def _config(adapters: Adapters, task: str | None, layers: Sequence[LayerAdapters], biased: bool) -> LoraConfig:
    modules = [layer.site.name for layer in layers if _by_module(adapters, layer)]
    parameters = [f"{layer.site.name}.{layer.site.parameter}" for layer in layers if not _by_module(adapters, layer)]
    return LoraConfig(
        task_type=task,
        base_model_name_or_path=getattr(adapters.model, "name_or_path", None) or None,
        target_modules=list(dict.fromkeys(modules)),
        target_parameters=parameters or None,
        lora_bias=biased,
    )


def _by_module(adapters: Adapters, layer: LayerAdapters) -> bool:
    """Tell whether a config names a layer by its module, and not as a parameter."""
    return any(site.id == layer.site.id for site in adapters.catalog.sites_at(layer.site.name))


def _combined(
    layer: LayerAdapters, combination: Combination, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return up, down and shift of the combined change of one layer."""
    kind = combination.kind
    pairs = zip(combination.names, combination.weights, strict=True)
    bound = [(name, weight) for name, weight in pairs if name in layer.bound]
    changes = [change_of(layer, layer.weight_patches([name])) for name, _ in bound]
    weights = [weight for _, weight in bound]
    shifts = [w * c.shift for w, c in zip(weights, changes, strict=True) if c.shift is not None]
    if shifts and kind not in ON_FACTORS:
        raise UnsupportedError(
            f"{layer.site.name}: {kind} is defined for changes of weights, and an adapter changes the bias.",
            hint=f"Use one of {', '.join(ON_FACTORS)}.",
        )
    shift = torch.stack(shifts).sum(0) if shifts else None
    ranks = [c.up.shape[-1] for c in changes if c.up is not None]
    rank = combination.rank or max(ranks, default=0)
    if kind in ON_FACTORS and len(ranks) == len(changes):
        up = torch.cat([w * c.up for w, c in zip(weights, changes, strict=True) if c.up is not None], -1)
        down = torch.cat([c.down for c in changes if c.down is not None], -2)
        if kind == "cat" and combination.rank is None:
            return up, down, shift
        exact = kind in EXACT and combination.rank is None
        return *truncated_product(up, down, None if exact else rank), shift
    if not rank:
        raise UnsupportedError(
            f"{layer.site.name}: a change is of no low rank, so the rank of the result must be chosen.",
            hint="Give svd_rank=..., such as 16.",
        )
    whole = _ON_CHANGES[kind.removesuffix("_svd")]([c.whole() for c in changes], weights, combination, generator)
    return *truncated(whole, rank), shift


# -- combining whole changes -------------------------------------------------------------------------------


def keep_largest(change: Tensor, density: float) -> Tensor:
    """Keep the share ``density`` of a change's values, those of largest magnitude; the rest is zero."""
    count = int(density * change.numel())
    pruned = torch.zeros_like(change)
    index = change.abs().flatten().topk(count).indices
    pruned.view(-1)[index] = change.flatten()[index]
    return pruned


def drop_at_random(change: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """Keep each value of a change with probability ``density``, divided by it; the rest is zero."""
    keep = torch.rand(change.shape, generator=generator).to(change.device) < density
    return change * keep / density


def elect(changes: Tensor, sign: str) -> Tensor:
    """Return, value by value, the mean of those of ``changes``, shape ``(n, ...)``, that have the prevailing sign."""
    votes = changes if sign == "total" else changes.sign()
    prevailing = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    agree = changes.sign() == prevailing
    return (changes * agree).sum(0) / agree.sum(0).clamp_min(1)


def _sum(changes: Sequence[Tensor], weights: Sequence[float], *_: object) -> Tensor:
    return torch.stack([w * change for w, change in zip(weights, changes, strict=True)]).sum(0)


def _ties(changes: Sequence[Tensor], weights: Sequence[float], combination: Combination, _: object) -> Tensor:
    pruned = [w * keep_largest(c, combination.density or 1.0) for w, c in zip(weights, changes, strict=True)]
    return elect(torch.stack(pruned), combination.sign)


def _magnitude_prune(
    changes: Sequence[Tensor], weights: Sequence[float], combination: Combination, _: object
) -> Tensor:
    return _sum([keep_largest(change, combination.density or 1.0) for change in changes], weights)


def _dropped(
    changes: Sequence[Tensor], weights: Sequence[float], combination: Combination, generator: torch.Generator | None
) -> list[Tensor]:
    density = combination.density or 1.0
    return [w * drop_at_random(c, density, generator) for w, c in zip(weights, changes, strict=True)]


def _dare_linear(
    changes: Sequence[Tensor], weights: Sequence[float], combination: Combination, generator: torch.Generator | None
) -> Tensor:
    return torch.stack(_dropped(changes, weights, combination, generator)).sum(0)


def _dare_ties(
    changes: Sequence[Tensor], weights: Sequence[float], combination: Combination, generator: torch.Generator | None
) -> Tensor:
    return elect(torch.stack(_dropped(changes, weights, combination, generator)), combination.sign)


_ON_CHANGES: Mapping[str, Callable[..., Tensor]] = {
    "cat": _sum,
    "linear": _sum,
    "svd": _sum,
    "magnitude_prune": _magnitude_prune,
    "dare_linear": _dare_linear,
    "ties": _ties,
    "dare_ties": _dare_ties,
}


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    """Pad a factor with zeros up to ``rank`` along ``dim``, so that one rank serves all layers."""
    missing = rank - factor.shape[dim]
    if not missing:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim)
