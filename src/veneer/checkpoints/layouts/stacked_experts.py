"""Stacks the LoRA of single experts for the one parameter in which transformers 5 keeps a layer's experts.

The LoRA of an expert becomes a slice of the stack's. Gate and up, which are one matrix now, share it as blocks:

    A = [A_gate ; A_up]        B = [[B_gate, 0], [0, B_up]]        of the rank of both together

Where the experts' ranks differ the smaller are filled with zeros; where their scales do, ``B`` takes up the rest.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING

from veneer.base_model.catalog import Catalog
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import names_match, pattern_value
from veneer.checkpoints.layouts.renamed_checkpoint import RenamedCheckpoint
from veneer.configs.base import Names
from veneer.configs.methods.lora import LoraConfig
from veneer.files.safetensors_header import TensorInfo
from veneer.files.tensor_keys import PREFIX

if TYPE_CHECKING:
    from torch import Tensor


# The matrices of an expert, by the names that older versions give them.
GATE, UP, DOWN = "gate", "up", "down"
_ROLES = {"w1": GATE, "w3": UP, "w2": DOWN, "gate_proj": GATE, "up_proj": UP, "down_proj": DOWN}
_EXPERT = re.compile(rf"(?P<block>.+)\.experts\.(?P<index>\d+)\.(?P<role>{'|'.join(_ROLES)})")
_LEAF = re.compile(r"\.(lora_[AB])\.weight$")


@dataclass(frozen=True)
class ExpertFactor:
    """Names ``A`` or ``B`` of one matrix of one expert, and its place in the stack.

    Attributes:
        key: the checkpoint's key.
        expert: the expert's index.
        rows: the index of its first rank among the stack's.
        out: the index of its first output among the stack's (``B``).
        gain: a factor (``B``).
    """

    key: str
    expert: int
    rows: int
    out: int = 0
    gain: float = 1.0


@dataclass(frozen=True)
class StackedTensor:
    """Describes a tensor of the new layout, put together from those of the old.

    Attributes:
        shape: the shape of the stack of matrices, ``(experts, r, in)`` or ``(experts, out, r)``.
        factors: the tensors in it; the rest is zero.
        is_down: it is ``A``.
    """

    shape: tuple[int, int, int]
    factors: tuple[ExpertFactor, ...]
    is_down: bool

    @property
    def stored(self) -> tuple[int, int]:
        """The shape on disk: ``(experts * r, in)`` or ``(out, r * experts)``."""
        experts, first, second = self.shape
        return (experts * first, second) if self.is_down else (first, second * experts)

    @property
    def is_widened(self) -> bool:
        """True where it is in float32, since something is multiplied: rounded, the product would be another."""
        return any(factor.gain != 1 for factor in self.factors)

    def make(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Put the tensor together as it would lie on disk."""
        import torch

        dtypes = [tensors[factor.key].dtype for factor in self.factors]
        stack = torch.zeros(
            self.shape, dtype=reduce(torch.promote_types, [*dtypes, *[torch.float32] * self.is_widened])
        )
        for factor in self.factors:
            values = tensors[factor.key].to(stack.dtype)
            first = factor.rows if self.is_down else factor.out
            second = 0 if self.is_down else factor.rows
            place = stack[factor.expert, first : first + values.shape[0], second : second + values.shape[1]]
            place.copy_(values if factor.gain == 1 else values * factor.gain)
        return stack.flatten(0, 1) if self.is_down else stack.permute(1, 2, 0).flatten(1)


@dataclass(frozen=True)
class RestackedCheckpoint(RenamedCheckpoint):
    """Holds a checkpoint under the keys of another layout.

    Attributes:
        stacks: key here -> how its tensor is put together.
    """

    stacks: Mapping[str, StackedTensor] = field(default_factory=dict)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors by their keys here, and put together those that are stacks."""
        keys = list(keys)
        stacks = {key: self.stacks[key] for key in keys if key in self.stacks}
        factors = [factor.key for stack in stacks.values() for factor in stack.factors]
        tensors = super().read([*(key for key in keys if key not in stacks), *factors])
        return {key: stacks[key].make(tensors) if key in stacks else tensors[key] for key in keys}


def stack_experts(
    checkpoint: RestackedCheckpoint, unknown: Iterable[str], keys: Mapping[str, list[str]], catalog: Catalog
) -> RestackedCheckpoint:
    """Return a LoRA checkpoint with the experts as parameters, where the model has them so.

    Args:
        checkpoint: a LoRA's.
        unknown: its modules that the model does not have.
        keys: module -> its keys.
        catalog: the model's modules.
    """
    layers = _experts(unknown, keys, catalog)
    if not layers:
        return checkpoint
    config, tensors, stacks = checkpoint.config, dict(checkpoint.tensors), {}
    assert isinstance(config, LoraConfig)
    endings = _parameters(layers, catalog)
    loras: dict[str, _StackedLora] = {}
    for site in catalog.parameter_sites(endings):
        lora = _StackedLora(site, layers[site.name], config, checkpoint.tensors) if site.name in layers else None
        if lora is None or not lora.fits():
            continue  # what does not fit keeps its keys, and is a problem of the plan
        loras[site.pattern_name] = lora
        for leaf, stack in (("lora_A", lora.down()), ("lora_B", lora.up())):
            key = f"{PREFIX}{site.key}.{leaf}.weight"
            stacks[key], tensors[key] = stack, _info(key, stack, checkpoint.tensors)
    for stack in stacks.values():
        for factor in stack.factors:
            tensors.pop(factor.key, None)
    note = f"Older layout: the LoRA of single experts in {len(layers)} layers was stacked for {', '.join(endings)}."
    config = _with_parameters(config, loras, endings, catalog)
    return replace(checkpoint, config=config, tensors=tensors, stacks=stacks, notes=(*checkpoint.notes, note))


@dataclass(frozen=True)
class _Role:
    """Holds all experts' LoRA of one matrix in one layer: expert -> key of ``A``, key of ``B``, and its module."""

    down: dict[int, str] = field(default_factory=dict)
    up: dict[int, str] = field(default_factory=dict)
    modules: dict[int, str] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """True where every expert has both factors."""
        return self.modules.keys() == self.down.keys() == self.up.keys()


class _StackedLora:
    """Stacks the experts' LoRA for one parameter that holds them all.

    Args:
        site: the parameter.
        roles: role -> the checkpoint's LoRA of it in the parameter's layer.
        config: the config, which says each expert's rank and scale.
        tensors: key -> its dtype and shape.

    Attributes:
        rank: the rank of the stack.
        scale: the scale of the stack, which most experts have; the ``B`` of the others take up the difference.
    """

    def __init__(
        self, site: Site, roles: Mapping[str, _Role], config: LoraConfig, tensors: Mapping[str, TensorInfo]
    ) -> None:
        self.out, self.inner = site.shape
        self.experts = site.stored.shape[0]
        self.tensors = tensors
        names = (GATE, UP) if site.parameter == "gate_up_proj" else (DOWN,)
        self.roles = {role: roles[role] for role in names if role in roles}
        self.ranks_and_scales = {
            (role, e): _rank_and_scale(config, module)
            for role, lora in self.roles.items()
            for e, module in lora.modules.items()
        }
        self.ranks = {
            role: max(self.ranks_and_scales[role, e][0] for e in lora.modules) for role, lora in self.roles.items()
        }
        self.rank = sum(self.ranks.values())
        scales = Counter(scale for _, scale in self.ranks_and_scales.values() if scale)
        self.scale = scales.most_common(1)[0][0] if scales else 0.0

    def fits(self) -> bool:
        """Tell whether each tensor has the shape that the parameter and the config want."""
        return all(
            e < self.experts
            and self.tensors[lora.down[e]].shape == (self.ranks_and_scales[role, e][0], self.inner)
            and self.tensors[lora.up[e]].shape == (self._height(role), self.ranks_and_scales[role, e][0])
            for role, lora in self.roles.items()
            for e in lora.modules
        )

    def _height(self, role: str) -> int:
        return self.out if role == DOWN else self.out // 2

    def _begin(self, role: str) -> int:
        return self.ranks.get(GATE, 0) if role == UP else 0

    def _gain(self, role: str, expert: int) -> float:
        return self.ranks_and_scales[role, expert][1] / self.scale if self.scale else 1.0

    def down(self) -> StackedTensor:
        """Return the stack of all ``A``."""
        parts = [
            ExpertFactor(key, e, self._begin(role)) for role, lora in self.roles.items() for e, key in lora.down.items()
        ]
        return StackedTensor((self.experts, self.rank, self.inner), tuple(parts), True)

    def up(self) -> StackedTensor:
        """Return the stack of all ``B``."""
        parts = [
            ExpertFactor(key, e, self._begin(role), self._height(role) if role == UP else 0, self._gain(role, e))
            for role, lora in self.roles.items()
            for e, key in lora.up.items()
        ]
        return StackedTensor((self.experts, self.out, self.rank), tuple(parts), False)


def _experts(unknown: Iterable[str], keys: Mapping[str, list[str]], catalog: Catalog) -> dict[str, dict[str, _Role]]:
    """Return module of the model -> role -> the checkpoint's LoRA of it."""
    layers: dict[str, dict[str, _Role]] = {}
    for name in unknown:
        match = _EXPERT.fullmatch(name)
        module = _module_of_experts(match["block"], catalog) if match else None
        if match is None or module is None:
            continue
        role = _ROLES[match["role"]]
        lora = layers.setdefault(module, {}).setdefault(role, _Role())
        lora.modules[int(match["index"])] = name
        for key in keys[name]:
            leaf = _LEAF.search(key)
            if leaf:
                (lora.down if leaf[1] == "lora_A" else lora.up)[int(match["index"])] = key
    complete = {
        module: {role: lora for role, lora in roles.items() if lora.is_complete} for module, roles in layers.items()
    }
    return {module: roles for module, roles in complete.items() if roles}


def _module_of_experts(block: str, catalog: Catalog) -> str | None:
    """Return the module that holds a block's experts in one parameter."""
    for name in (f"{block}.experts", catalog.renamed(f"{block}.experts")):
        module = catalog.modules.get(name)
        if module is not None and {"gate_up_proj", "down_proj"} <= module._parameters.keys():
            return name
    return None


def _parameters(layers: Mapping[str, Mapping[str, _Role]], catalog: Catalog) -> list[str]:
    """Return ``target_parameters`` for these layers: endings where they mean exactly those, else full names."""
    full = []
    for module, roles in layers.items():
        full += [f"{module}.gate_up_proj"] if GATE in roles or UP in roles else []
        full += [f"{module}.down_proj"] if DOWN in roles else []
    endings = sorted({".".join(name.split(".")[-3:]) for name in full}, reverse=True)
    return (
        endings
        if {s.id for s in catalog.parameter_sites(endings)} == {s.id for s in catalog.parameter_sites(full)}
        else full
    )


def _rank_and_scale(config: LoraConfig, module: str) -> tuple[int, float]:
    rank = pattern_value(module, config.rank_pattern, config.r)
    alpha = pattern_value(module, config.alpha_pattern, config.lora_alpha)
    return rank, float(alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)


def _with_parameters(
    config: LoraConfig, loras: Mapping[str, _StackedLora], endings: list[str], catalog: Catalog
) -> LoraConfig:
    """Return the config with the experts as parameters, and their ranks and alphas first among the patterns."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for ending in endings:
        named = {name: (lora.rank, lora.scale) for name, lora in loras.items() if names_match(name, [ending])}
        if len(set(named.values())) == 1:
            named = {ending: next(iter(named.values()))}
        for name, (rank, scale) in named.items():
            ranks[name], alphas[name] = rank, scale * (math.sqrt(rank) if config.use_rslora else rank)
    return replace(
        config,
        target_modules=_still_there(config, catalog),
        target_parameters=[*(config.target_parameters or ()), *endings],
        rank_pattern={**{name: r for name, r in ranks.items() if r != config.r}, **config.rank_pattern},
        alpha_pattern={**{n: a for n, a in alphas.items() if a != config.lora_alpha}, **config.alpha_pattern},
    )


def _still_there(config: LoraConfig, catalog: Catalog) -> Names | None:
    """Return ``target_modules`` without the names that the model has no longer."""
    targets = config.target_modules
    if isinstance(targets, (set, list)):
        return {ending for ending in targets if any(names_match(name, [ending]) for name in catalog.modules)}
    if isinstance(targets, str) and not any(names_match(name, targets) for name in catalog.modules):
        return set()
    return targets


def _info(key: str, stack: StackedTensor, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    """Describe a stack as a header would."""
    dtypes = {tensors[factor.key].dtype for factor in stack.factors}
    first = tensors[stack.factors[0].key]
    width = 4 if stack.is_widened or len(dtypes) > 1 else first.nbytes // max(first.numel, 1)
    return TensorInfo(key, "F32" if width == 4 else first.dtype, stack.stored, 0, math.prod(stack.stored) * width)
