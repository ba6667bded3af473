"""Checkpoints of older layouts, read as the layout that a model has now.

transformers 5 keeps a layer's experts in one parameter, where version 4 had a module for each; it moved the parts of
vision-language models, and renamed the layers of image models. Its own rules for a base of an older version say what a
module is called now. Experts, and parts of which it has no rule, are found by structure:

    ...block_sparse_moe.experts.3.w1, .w3, .w2               -> ...mlp.experts, gate_up_proj and down_proj
    ...mlp.experts.3.gate_proj, .up_proj, .down_proj         -> the same
    vit.encoder.layer.0.attention.attention.query            -> vit.layers.0.attention.q_proj, by transformers' rules
    language_model.model.layers.0.self_attn.q_proj           -> model.language_model.layers.0.self_attn.q_proj

The LoRA of an expert becomes a slice of the stack's. Gate and up, which are one matrix now, share it as blocks:

    A = [A_gate ; A_up]        B = [[B_gate, 0], [0, B_up]]        of the rank of both together

Where the experts' ranks differ the smaller are filled with zeros; where their scales do, ``B`` takes up the rest.
A layer that is never called (the ``out_proj`` inside ``nn.MultiheadAttention``) is left out: what is there never acts.

Only keys whose module the model does not have are touched, and what was done is told in the notes.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, reduce
from typing import TYPE_CHECKING

from torch import nn

from veneer.base_model.catalog import Catalog
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import names_match, pattern_value
from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.closeness import Closeness
from veneer.checkpoints.old_names import OldNames, as_named_now, kinds_of
from veneer.checkpoints.spellings import Respelt
from veneer.configs.base import TargetedConfig
from veneer.configs.methods.lora import LoraConfig
from veneer.files.safetensors_header import TensorInfo
from veneer.files.tensor_keys import PREFIX
from veneer.methods import method_of
from veneer.methods.base.abilities import specialised

if TYPE_CHECKING:
    from torch import Tensor


GATE, UP, DOWN = "gate", "up", "down"
_ROLES = {"w1": GATE, "w3": UP, "w2": DOWN, "gate_proj": GATE, "up_proj": UP, "down_proj": DOWN}
_EXPERT = re.compile(rf"(?P<block>.+)\.experts\.(?P<index>\d+)\.(?P<role>{'|'.join(_ROLES)})")
_LEAF = re.compile(r"\.(lora_[AB])\.weight$")
# What a module's name may begin with in one version and not in another.
_MOVING = frozenset({"language_model", "model", "text_model", "vision_model", "vision_tower", "visual"})
# What may stand between a module's name and a tensor's: peft's own modules.
_BETWEEN = frozenset({"base_layer", "token_adapter", "modules_to_save", "original_module"})
# How many kinds of moved names a note tells.
_TOLD = 4


@dataclass(frozen=True)
class ExpertFactor:
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
    factors: tuple[ExpertFactor, ...]
    is_down: bool

    @property
    def stored(self) -> tuple[int, int]:
        """Its shape on disk: ``(experts * r, in)`` or ``(out, r * experts)``."""
        experts, first, second = self.shape
        return (experts * first, second) if self.is_down else (first, second * experts)

    @property
    def is_widened(self) -> bool:
        """Whether it is in float32, since something is multiplied: rounded, the product would be another."""
        return any(factor.gain != 1 for factor in self.factors)

    def make(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor, as it would lie on disk."""
        import torch

        dtypes = [tensors[factor.key].dtype for factor in self.factors]
        stack = torch.zeros(
            self.shape, dtype=reduce(torch.promote_types, [*dtypes, *[torch.float32] * self.is_widened])
        )
        for factor in self.factors:
            own = tensors[factor.key].to(stack.dtype)
            first = factor.rows if self.is_down else factor.out
            second = 0 if self.is_down else factor.rows
            place = stack[factor.expert, first : first + own.shape[0], second : second + own.shape[1]]
            place.copy_(own if factor.gain == 1 else own * factor.gain)
        return stack.flatten(0, 1) if self.is_down else stack.permute(1, 2, 0).flatten(1)


@dataclass(frozen=True)
class Remapped(Respelt):
    """A checkpoint under the keys of another layout.

    Attributes:
        stacks: key here -> how it is put together.
    """

    stacks: Mapping[str, Stack] = field(default_factory=dict)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Key -> tensor."""
        wanted = list(keys)
        parts = {key: [f.key for f in self.stacks[key].factors] for key in wanted if key in self.stacks}
        own = [key for key in wanted if key not in parts]
        tensors = super().read([*own, *(key for keys in parts.values() for key in keys)])
        return {key: self.stacks[key].make(tensors) if key in parts else tensors[key] for key in wanted}


def in_current_layout(checkpoint: Checkpoint, catalog: Catalog) -> Checkpoint:
    """``checkpoint`` in the layout of the model; itself where it already is, or where nothing fits."""
    config = checkpoint.config
    if not isinstance(config, TargetedConfig):
        return checkpoint
    heads = _heads(config)
    keys: dict[str, list[str]] = defaultdict(list)
    for key in checkpoint.tensors:
        keys[_module_of(key, heads)].append(key)
    unknown = [name for name in keys if name and name not in catalog.modules]
    routers = [name for name in keys if name in catalog.modules and _is_router(name, catalog)]
    if not unknown and not routers and catalog.never_called.isdisjoint(keys):
        return checkpoint
    moved = _moved(unknown, set(keys), catalog)
    now = Remapped(checkpoint.origin, config, dict(checkpoint.tensors), checkpoint.metadata, (), old=checkpoint)
    now = replace(now, notes=checkpoint.notes)
    now = _without_idle(_renamed(now, moved, keys, catalog), heads, catalog)
    if isinstance(config, LoraConfig):
        now = _fused(now, [name for name in unknown if name not in moved], keys, catalog)
        now = _routed(now, [*routers, *(new for new in moved.values() if _is_router(new, catalog))])
    return now if now.notes != checkpoint.notes else checkpoint


def closeness(checkpoint: Checkpoint, catalog: Catalog) -> Closeness:
    """How well the modules that a checkpoint names are the model's; a prompt names none."""
    config = checkpoint.config
    if not isinstance(config, TargetedConfig):
        return Closeness.EXACT
    heads, have = _heads(config), {"", *catalog.modules}
    if have.issuperset(_module_of(key, heads) for key in checkpoint.tensors):
        return Closeness.EXACT
    now = in_current_layout(checkpoint, catalog)
    fits = have.issuperset(_module_of(key, heads) for key in now.tensors)
    return Closeness.RENAMED if fits else Closeness.NONE


def _heads(config: TargetedConfig) -> frozenset[str]:
    """The words that follow a module's name in a key."""
    return frozenset(leaf.partition(".")[0] for leaf in specialised(method_of(config), config).disk_names) | _BETWEEN


@lru_cache(maxsize=1 << 13)
def _module_of(key: str, heads: frozenset[str]) -> str:
    """The module that a key belongs to; none for a tensor that all share."""
    if not key.startswith(PREFIX):
        return ""
    words = key[len(PREFIX) :].split(".")
    end = next((index for index, word in enumerate(words) if index and word in heads), len(words) - 1)
    return ".".join(words[:end])


# -- names that moved --------------------------------------------------------------------------------------


def _moved(unknown: Iterable[str], taken: set[str], catalog: Catalog) -> dict[str, str]:
    """Module in the checkpoint -> the one module of the model that it can be."""
    endings: dict[str, list[str]] = defaultdict(list)
    for name in catalog.modules:
        endings[_last(name)].append(name)
    found: dict[str, str] = {}
    for name in unknown:
        published = catalog.renamed(name)
        new = published if published in catalog.modules else _prefix_moved(name, endings.get(_last(name), []))
        if new is not None and new not in taken and new not in found.values():
            found[name] = new
    return found


def _prefix_moved(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that differs from ``name`` only in leading words that are known to move.

    transformers publishes no rule for the names of a text model inside a vision-language model, nor for those that many
    vision-language models had in its version 4: its rules are for the weights on the hub.
    """
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


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _renamed(now: Remapped, moved: Mapping[str, str], keys: Mapping[str, list[str]], catalog: Catalog) -> Remapped:
    if not moved:
        return now
    tensors, renamed = dict(now.tensors), {}
    for old, new in moved.items():
        for key in keys[old]:
            own = PREFIX + new + key[len(PREFIX) + len(old) :]
            tensors[own], renamed[own] = tensors.pop(key), key
    assert isinstance(now.config, TargetedConfig)
    held = {moved.get(name, name) for name in keys}
    config = as_named_now(now.config, OldNames(moved, catalog.modules), held, catalog)
    kinds = kinds_of(moved)
    told = ", ".join(kinds[:_TOLD]) + (f" and {len(kinds) - _TOLD} more" if len(kinds) > _TOLD else "")
    note = f"Older layout: {len(moved)} modules were found under other names: {told}."
    return replace(now, config=config, tensors=tensors, renamed=renamed, notes=(*now.notes, note))


# -- layers that are never called --------------------------------------------------------------------------


def _without_idle(now: Remapped, heads: frozenset[str], catalog: Catalog) -> Remapped:
    """Without the tensors of layers that are never called, unless there are no others."""
    own = heads - _BETWEEN
    idle: dict[str, list[str]] = defaultdict(list)
    for key in now.tensors:
        module = _module_of(key, heads)
        if module in catalog.never_called and key[len(PREFIX) + len(module) + 1 :].partition(".")[0] in own:
            idle[module].append(key)
    left_out = {key for keys in idle.values() for key in keys}
    if not left_out or left_out == now.tensors.keys():
        return now
    assert isinstance(now.config, TargetedConfig)
    config = replace(now.config, exclude_modules=_excluding(now.config.exclude_modules, idle))
    tensors = {key: info for key, info in now.tensors.items() if key not in left_out}
    note = f"{len(idle)} layers that are adapted are never called, here or in PEFT, and left out (first: {min(idle)})."
    return replace(now, config=config, tensors=tensors, notes=(*now.notes, note))


def _excluding(excluded: list[str] | str | None, names: Iterable[str]) -> list[str] | str:
    """``exclude_modules`` with more names."""
    if isinstance(excluded, str):
        return "|".join([f"({excluded})", *map(re.escape, names)])
    return list(dict.fromkeys([*(excluded or ()), *names]))


# -- experts that became one parameter ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Role:
    """All experts' LoRA of one matrix in one layer: expert -> key of ``A``, key of ``B``, and the module it was."""

    down: dict[int, str] = field(default_factory=dict)
    up: dict[int, str] = field(default_factory=dict)
    modules: dict[int, str] = field(default_factory=dict)


class _Share:
    """What the experts' LoRA is for one parameter that holds them all.

    Args:
        site: the parameter.
        roles: what the checkpoint holds for its layer.
        config: the config, which says each expert's rank and scale.
        tensors: key -> what the header says.

    Attributes:
        rank: of the stack.
        scale: of the stack, which most experts have; the others are multiplied by what theirs differs.
    """

    def __init__(
        self, site: Site, roles: Mapping[str, _Role], config: LoraConfig, tensors: Mapping[str, TensorInfo]
    ) -> None:
        self.out, self.inner = site.shape
        self.experts = site.stored.shape[0]
        self.tensors = tensors
        wanted = (GATE, UP) if site.parameter == "gate_up_proj" else (DOWN,)
        self.roles = {role: roles[role] for role in wanted if role in roles}
        self.own = {
            (role, e): _rank_and_scale(config, module)
            for role, own in self.roles.items()
            for e, module in own.modules.items()
        }
        self.ranks = {role: max(r for (own, _), (r, _) in self.own.items() if own == role) for role in self.roles}
        self.rank = sum(self.ranks.values())
        scales = Counter(scale for _, scale in self.own.values() if scale)
        self.scale = scales.most_common(1)[0][0] if scales else 0.0

    def fits(self) -> bool:
        """Whether each tensor has the shape that the parameter and the config want."""
        return all(
            e < self.experts
            and self.tensors[own.down[e]].shape == (self.own[role, e][0], self.inner)
            and self.tensors[own.up[e]].shape == (self._height(role), self.own[role, e][0])
            for role, own in self.roles.items()
            for e in own.modules
        )

    def _height(self, role: str) -> int:
        return self.out if role == DOWN else self.out // 2

    def _begin(self, role: str) -> int:
        return self.ranks.get(GATE, 0) if role == UP else 0

    def _gain(self, role: str, expert: int) -> float:
        return self.own[role, expert][1] / self.scale if self.scale else 1.0

    def down(self) -> Stack:
        """``A``."""
        parts = [
            ExpertFactor(key, e, self._begin(role)) for role, own in self.roles.items() for e, key in own.down.items()
        ]
        return Stack((self.experts, self.rank, self.inner), tuple(parts), True)

    def up(self) -> Stack:
        """``B``."""
        parts = [
            ExpertFactor(key, e, self._begin(role), self._height(role) if role == UP else 0, self._gain(role, e))
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
        if not own.fits():
            continue  # what does not fit keeps its keys, and is a problem of the plan
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
        own = found.setdefault(module, {}).setdefault(role, _Role())
        own.modules[int(match["index"])] = name
        for key in keys[name]:
            leaf = _LEAF.search(key)
            if leaf:
                (own.down if leaf[1] == "lora_A" else own.up)[int(match["index"])] = key
    complete = {
        m: {r: o for r, o in roles.items() if o.modules.keys() == o.down.keys() == o.up.keys()}
        for m, roles in found.items()
    }
    return {module: roles for module, roles in complete.items() if roles}


def _fused_module(block: str, catalog: Catalog) -> str | None:
    """The module that holds a block's experts in one parameter."""
    for name in (f"{block}.experts", catalog.renamed(f"{block}.experts")):
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


def _rank_and_scale(config: LoraConfig, module: str) -> tuple[int, float]:
    rank = pattern_value(module, config.rank_pattern, config.r)
    alpha = pattern_value(module, config.alpha_pattern, config.lora_alpha)
    return rank, float(alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)


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
    dtypes = {tensors[factor.key].dtype for factor in stack.factors}
    one = tensors[stack.factors[0].key]
    width = 4 if stack.is_widened or len(dtypes) > 1 else one.nbytes // max(one.numel, 1)
    return TensorInfo(key, "F32" if width == 4 else one.dtype, stack.stored, 0, math.prod(stack.stored) * width)


# -- routers that are no linear layers now -----------------------------------------------------------------


def _is_router(name: str, catalog: Catalog) -> bool:
    """Whether it is what was a linear layer, and gives more than one tensor now."""
    module = catalog.modules[name]
    weight = module._parameters.get("weight")
    if not name.endswith((".gate", ".router")) or weight is None or weight.ndim != 2:
        return False
    own_forward = type(module).forward is not nn.Linear.forward and weight.is_floating_point()
    return not catalog.sites_at(name) or (isinstance(module, nn.Linear) and own_forward)


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
