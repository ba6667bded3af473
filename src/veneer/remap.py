"""Checkpoints of older layouts, read as the layout that a model has now.

transformers 5 keeps a layer's experts in one parameter, where version 4 had a module for each, and it moved the parts
of vision-language models. Both are found by structure, not by a model's name:

    ...block_sparse_moe.experts.3.w1, .w3, .w2               -> ...mlp.experts, gate_up_proj and down_proj
    ...mlp.experts.3.gate_proj, .up_proj, .down_proj         -> the same
    language_model.model.layers.0.self_attn.q_proj           -> model.language_model.layers.0.self_attn.q_proj

The LoRA of an expert becomes a slice of the stack's. Gate and up, which are one matrix now, share it as blocks:

    A = [A_gate ; A_up]        B = [[B_gate, 0], [0, B_up]]        of the rank of both together

Only keys whose module the model does not have are touched, and what was done is told in the notes.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from veneer.catalog import Catalog
from veneer.checkpoint import Checkpoint
from veneer.codec import PREFIX
from veneer.config import TargetedConfig
from veneer.configs.lora import LoraConfig
from veneer.sites import Site
from veneer.source import TensorInfo
from veneer.targets import names_match, pattern_value

if TYPE_CHECKING:
    from torch import Tensor

GATE, UP, DOWN = "gate", "up", "down"
_ROLES = {"w1": GATE, "w3": UP, "w2": DOWN, "gate_proj": GATE, "up_proj": UP, "down_proj": DOWN}
_EXPERT = re.compile(rf"(?P<block>.+)\.experts\.(?P<index>\d+)\.(?P<role>{'|'.join(_ROLES)})")
_LEAF = re.compile(r"\.(lora_[AB])\.weight$")
# What a module's name may begin with in one version and not in another.
_MOVING = frozenset({"language_model", "model", "text_model", "vision_model", "vision_tower", "visual"})


@dataclass(frozen=True)
class Factor:
    """``A`` or ``B`` of one expert's one matrix.

    Attributes:
        key: the checkpoint's key.
        expert: whose.
        rows: where its rank begins in the stack's.
        out: where its outputs begin in the stack's (``B``).
        gain: multiplies it (``B``).
    """

    key: str
    expert: int
    rows: int
    out: int = 0
    gain: float = 1.0


@dataclass(frozen=True)
class Stack:
    """A tensor of the new layout, put together from those of the old.

    Attributes:
        shape: of the stack of matrices, ``(experts, r, in)`` or ``(experts, out, r)``.
        factors: what it is made of; the rest is zero.
        is_down: whether it is ``A``.
    """

    shape: tuple[int, int, int]
    factors: tuple[Factor, ...]
    is_down: bool

    @property
    def stored(self) -> tuple[int, int]:
        """Its shape on disk: ``(experts * r, in)`` or ``(out, r * experts)``."""
        experts, first, second = self.shape
        return (experts * first, second) if self.is_down else (first, second * experts)

    def make(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor, as it would lie on disk."""
        import torch

        stack = torch.zeros(self.shape, dtype=tensors[self.factors[0].key].dtype)
        for factor in self.factors:
            own = tensors[factor.key]
            first = factor.rows if self.is_down else factor.out
            second = 0 if self.is_down else factor.rows
            place = stack[factor.expert, first : first + own.shape[0], second : second + own.shape[1]]
            place.copy_(own if factor.gain == 1 else own * factor.gain)
        return stack.flatten(0, 1) if self.is_down else stack.permute(1, 2, 0).flatten(1)


@dataclass(frozen=True)
class Remapped(Checkpoint):
    """A checkpoint under the keys of another layout.

    Attributes:
        old: the checkpoint as it lies on disk.
        renamed: key here -> key there.
        stacks: key here -> how it is put together.
    """

    old: Checkpoint | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, Stack] = field(default_factory=dict)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Key -> tensor."""
        wanted = list(keys)
        assert self.old is not None
        parts = {key: [f.key for f in self.stacks[key].factors] for key in wanted if key in self.stacks}
        own = {key: self.renamed.get(key, key) for key in wanted if key not in parts}
        tensors = self.old.read([*own.values(), *(key for keys in parts.values() for key in keys)])
        return {key: self.stacks[key].make(tensors) if key in parts else tensors[own[key]] for key in wanted}


def remapped(checkpoint: Checkpoint, catalog: Catalog) -> Checkpoint:
    """``checkpoint`` in the layout of the model; itself where it already is, or where nothing fits."""
    config = checkpoint.config
    if not isinstance(config, TargetedConfig):
        return checkpoint
    keys: dict[str, list[str]] = defaultdict(list)
    for key in checkpoint.tensors:
        keys[_module_of(key)].append(key)
    unknown = [name for name in keys if name and name not in catalog.modules]
    routers = [name for name in keys if name in catalog.modules and _is_router(name, catalog)]
    if not unknown and not routers:
        return checkpoint
    moved = _moved(unknown, set(keys), catalog)
    now = Remapped(checkpoint.origin, config, dict(checkpoint.tensors), checkpoint.metadata, (), old=checkpoint)
    now = _renamed(now, moved, keys)
    if isinstance(config, LoraConfig):
        now = _fused(now, [name for name in unknown if name not in moved], keys, catalog)
        now = _routed(now, [*routers, *(new for new in moved.values() if _is_router(new, catalog))])
    return now if now.notes else checkpoint


@lru_cache(maxsize=1 << 13)
def _module_of(key: str) -> str:
    name = key.removeprefix(PREFIX)
    return re.sub(r"\.(lora_[A-Za-z_]+(\.(weight|bias))?|[^.]+)$", "", name) if key.startswith(PREFIX) else ""


# -- names that moved --------------------------------------------------------------------------------------


def _moved(unknown: Iterable[str], taken: set[str], catalog: Catalog) -> dict[str, str]:
    """Module in the checkpoint -> the one module of the model that it can be."""
    endings: dict[str, list[str]] = defaultdict(list)
    for name in catalog.modules:
        endings[name.rpartition(".")[2]].append(name)
    found: dict[str, str] = {}
    for name in unknown:
        new = _block_moved(name, catalog) or _prefix_moved(name, endings.get(name.rpartition(".")[2], []))
        if new is not None and new not in taken and new not in found.values():
            found[name] = new
    return found


def _prefix_moved(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that differs from ``name`` only in leading words that are known to move."""
    fitting: dict[str, tuple[int, int]] = {}
    for new in candidates:
        tail = _common_tail(name, new)
        before, after = _head(name, tail), _head(new, tail)
        words = {*before, *after}
        # "model." alone tells a model with a head from one without, and not a version from another.
        if tail and words <= _MOVING and words != {"model"}:
            fitting[new] = (len(set(before) & set(after)), tail)
    best = max(fitting.values(), default=None)
    chosen = [new for new, rank in fitting.items() if rank == best]
    return chosen[0] if len(chosen) == 1 else None


def _common_tail(a: str, b: str) -> int:
    """How many words two names end in alike."""
    count = 0
    for left, right in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if left != right:
            break
        count += 1
    return count


def _head(name: str, tail: int) -> list[str]:
    return name.split(".")[:-tail] if tail else name.split(".")


def _block_moved(name: str, catalog: Catalog) -> str | None:
    """Mixtral's ``block_sparse_moe`` is ``mlp`` now."""
    new = name.replace(".block_sparse_moe.", ".mlp.")
    return new if new != name and new in catalog.modules else None


def _renamed(now: Remapped, moved: Mapping[str, str], keys: Mapping[str, list[str]]) -> Remapped:
    if not moved:
        return now
    tensors, renamed = dict(now.tensors), {}
    pairs: set[tuple[str, str]] = set()
    for old, new in moved.items():
        tail = _common_tail(old, new)
        pairs.add((".".join(_head(old, tail)), ".".join(_head(new, tail))))
        for key in keys[old]:
            own = PREFIX + new + key[len(PREFIX) + len(old) :]
            tensors[own], renamed[own] = tensors.pop(key), key
    config = now.config
    assert isinstance(config, TargetedConfig)
    names = config.target_modules
    if isinstance(names, list):
        config = replace(config, target_modules=[moved.get(name, name) for name in names])
    told = ", ".join(f"{old or '(none)'} -> {new or '(none)'}" for old, new in sorted(pairs))
    note = f"Older layout: {len(moved)} modules were found under other names: {told}."
    return replace(now, config=config, tensors=tensors, renamed=renamed, notes=(*now.notes, note))


# -- experts that became one parameter ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Role:
    """All experts' LoRA of one matrix in one layer: expert -> key of ``A`` and of ``B``."""

    down: dict[int, str] = field(default_factory=dict)
    up: dict[int, str] = field(default_factory=dict)
    module: str = ""


class _Share:
    """What the experts' LoRA is for one parameter that holds them all.

    Args:
        site: the parameter.
        roles: what the checkpoint holds for its layer.
        config: the config, which says each expert's scale.
        tensors: key -> what the header says.
    """

    def __init__(
        self, site: Site, roles: Mapping[str, _Role], config: LoraConfig, tensors: Mapping[str, TensorInfo]
    ) -> None:
        self.out, self.inner = site.shape
        self.experts = site.stored.shape[0]
        wanted = (GATE, UP) if site.parameter == "gate_up_proj" else (DOWN,)
        self.roles = {role: roles[role] for role in wanted if role in roles}
        self.ranks = {role: tensors[next(iter(own.down.values()))].shape[0] for role, own in self.roles.items()}
        self.scales = {role: _scale(config, own.module) for role, own in self.roles.items()}

    @property
    def rank(self) -> int:
        """Of the stack."""
        return sum(self.ranks.values())

    @property
    def scale(self) -> float:
        """Of the stack: the first role's; the others are multiplied by what they differ."""
        return next(iter(self.scales.values()))

    def _begin(self, role: str) -> int:
        return self.ranks.get(GATE, 0) if role == UP else 0

    def down(self) -> Stack:
        """``A``."""
        parts = [Factor(key, e, self._begin(role)) for role, own in self.roles.items() for e, key in own.down.items()]
        return Stack((self.experts, self.rank, self.inner), tuple(parts), True)

    def up(self) -> Stack:
        """``B``."""
        parts = [
            Factor(key, e, self._begin(role), self.out // 2 if role == UP else 0, self.scales[role] / self.scale)
            for role, own in self.roles.items()
            for e, key in own.up.items()
        ]
        return Stack((self.experts, self.out, self.rank), tuple(parts), False)


def _fused(now: Remapped, unknown: Iterable[str], keys: Mapping[str, list[str]], catalog: Catalog) -> Remapped:
    layers = _experts(unknown, keys, catalog)
    if not layers:
        return now
    config, tensors, stacks = now.config, dict(now.tensors), {}
    assert isinstance(config, LoraConfig)
    wanted = _parameters(layers, catalog)
    sites = [site for site in catalog.parameter_sites(wanted) if site.name in layers]
    shares: dict[str, tuple[int, float]] = {}
    for site in sites:
        own = _Share(site, layers[site.name], config, now.tensors)
        shares[site.pattern_name] = own.rank, own.scale
        for leaf, stack in (("lora_A", own.down()), ("lora_B", own.up())):
            key = f"{PREFIX}{site.key}.{leaf}.weight"
            stacks[key], tensors[key] = stack, _info(key, stack, now.tensors)
    for stack in stacks.values():
        for factor in stack.factors:
            tensors.pop(factor.key, None)
    note = f"Older layout: the LoRA of single experts in {len(layers)} layers was stacked for {', '.join(wanted)}."
    config = _fused_config(config, shares, wanted, catalog)
    return replace(now, config=config, tensors=tensors, stacks=stacks, notes=(*now.notes, note))


def _experts(unknown: Iterable[str], keys: Mapping[str, list[str]], catalog: Catalog) -> dict[str, dict[str, _Role]]:
    """Fused module -> role -> what the checkpoint holds for it."""
    found: dict[str, dict[str, _Role]] = {}
    for name in unknown:
        match = _EXPERT.fullmatch(name)
        module = _fused_module(match["block"], catalog) if match else None
        if match is None or module is None:
            continue
        role = _ROLES[match["role"]]
        own = found.setdefault(module, {}).setdefault(role, _Role(module=name))
        for key in keys[name]:
            leaf = _LEAF.search(key)
            if leaf:
                (own.down if leaf[1] == "lora_A" else own.up)[int(match["index"])] = key
    complete = {
        m: {r: o for r, o in roles.items() if o.down and o.down.keys() == o.up.keys()} for m, roles in found.items()
    }
    return {module: roles for module, roles in complete.items() if roles}


def _fused_module(block: str, catalog: Catalog) -> str | None:
    """The module that holds a block's experts in one parameter."""
    for name in (f"{block}.experts", f"{block.rpartition('.')[0]}.mlp.experts"):
        module = catalog.modules.get(name)
        if module is not None and {"gate_up_proj", "down_proj"} <= module._parameters.keys():
            return name
    return None


def _parameters(layers: Mapping[str, Mapping[str, _Role]], catalog: Catalog) -> list[str]:
    """``target_parameters`` for what the checkpoint holds: endings where they mean exactly that, else full names."""
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


def _scale(config: LoraConfig, module: str) -> float:
    rank = pattern_value(module, config.rank_pattern, config.r)
    alpha = pattern_value(module, config.alpha_pattern, config.lora_alpha)
    return float(alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)


def _fused_config(
    config: LoraConfig, shares: Mapping[str, tuple[int, float]], wanted: list[str], catalog: Catalog
) -> LoraConfig:
    """The config with the experts as parameters, and their ranks and alphas first among the patterns."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for ending in wanted:
        meant = {share for name, share in shares.items() if names_match(name, [ending])}
        names = [ending] if len(meant) == 1 else [name for name in shares if names_match(name, [ending])]
        for name in names:
            rank, scale = next(share for full, share in shares.items() if names_match(full, [name]))
            ranks[name], alphas[name] = rank, scale * (math.sqrt(rank) if config.use_rslora else rank)
    return replace(
        config,
        target_modules=_still_there(config, catalog),
        target_parameters=[*(config.target_parameters or ()), *wanted],
        rank_pattern={**{name: r for name, r in ranks.items() if r != config.r}, **config.rank_pattern},
        alpha_pattern={**{n: a for n, a in alphas.items() if a != config.lora_alpha}, **config.alpha_pattern},
    )


def _still_there(config: LoraConfig, catalog: Catalog) -> list[str] | str | None:
    """``target_modules`` without what the model has no longer."""
    wanted = config.target_modules
    if isinstance(wanted, list):
        return [one for one in wanted if any(names_match(name, [one]) for name in catalog.modules)]
    if isinstance(wanted, str) and not any(names_match(name, wanted) for name in catalog.modules):
        return []
    return wanted


def _info(key: str, stack: Stack, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    """What a header would say of the tensor."""
    one = tensors[stack.factors[0].key]
    size = math.prod(stack.stored) * one.nbytes // max(one.numel, 1)
    return TensorInfo(key, one.dtype, stack.stored, 0, size)


# -- routers that are no linear layers now -----------------------------------------------------------------


def _is_router(name: str, catalog: Catalog) -> bool:
    weight = catalog.modules[name]._parameters.get("weight")
    return name.endswith(".gate") and weight is not None and weight.ndim == 2 and not catalog.sites_at(name)


def _routed(now: Remapped, routers: Iterable[str]) -> Remapped:
    """Routers are adapted as parameters; their keys stay."""
    config = now.config
    assert isinstance(config, LoraConfig)
    named = [f"{name}.weight" for name in routers if not names_match(f"{name}.weight", config.target_parameters or ())]
    if not named:
        return now
    targets = config.target_modules
    kept = (
        [t for t in targets if not any(names_match(n.removesuffix(".weight"), [t]) for n in named)]
        if isinstance(targets, list)
        else targets
    )
    config = replace(config, target_modules=kept, target_parameters=[*(config.target_parameters or ()), *named])
    note = f"Older layout: {len(named)} routers are adapted as parameters, being no linear layers now."
    return replace(now, config=config, notes=(*now.notes, note))
