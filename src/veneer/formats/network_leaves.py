"""Translates the tensors that kohya's scripts, LyCORIS and ComfyUI have for a module, and PEFT's, into each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.errors import BindError, UnsupportedError
from veneer.formats.canonical import ModuleChange
from veneer.formats.network_names import PREFIXES
from veneer.formats.scaling import effective_alpha

# Spelling in some file -> kohya's.
_SPELLINGS: Mapping[str, str] = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_up.bias": "lora_B.bias",
}
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_LORA = ("lora_down.weight", "lora_up.weight", "lora_mid.weight")
_WHOLE = "trained weights, which are no low-rank factors"
_GLORA = "GLoRA, which has other factors than PEFT's"
_OFT = "an OFT of the outputs, where PEFT's turns the inputs"
# Leaf that no method of PEFT has -> what it belongs to.
_FOREIGN: Mapping[str, str] = {
    **dict.fromkeys(("diff", "diff_b", "w_norm", "b_norm", "set_weight"), _WHOLE),
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"), _GLORA),
    **dict.fromkeys(("oft_blocks", "oft_diag", "rescale"), _OFT),
}
_ON_INPUT, _IA3, _BIAS = "on_input", "weight", "lora_B.bias"
_LEAVES = sorted(
    (*_SPELLINGS, *_LORA, *_LOHA, *_LOKR, *_FOREIGN, "dora_scale", "alpha", _ON_INPUT, _IA3, _BIAS),
    key=len,
    reverse=True,
)
_ELSEWHERE = (
    "Merge it with the tool that made it, and take a LoRA from the merged model: "
    "veneer extract MERGED --base BASE --rank 16 --out LORA."
)


@dataclass(frozen=True)
class FileModule:
    """The tensors that a file has for one module.

    Attributes:
        name: the module, as the file names it.
        leaves: kohya's name of the leaf -> tensor.
    """

    name: str
    leaves: Mapping[str, Tensor]

    @property
    def is_plain(self) -> bool:
        """True for a LoRA without magnitudes."""
        return self.leaves.keys() <= {*_LORA, "alpha"}


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key into its module and kohya's name of the leaf; ``None`` where it ends in no known leaf."""
    if key.startswith(PREFIXES):
        # Such names have no dots.
        module, _, leaf = key.partition(".")
        return (module, _SPELLINGS.get(leaf, leaf)) if leaf in _LEAVES else None
    for leaf in _LEAVES:
        if key.endswith("." + leaf):
            return key[: -len(leaf) - 1], _SPELLINGS.get(leaf, leaf)
    return None


def by_module(tensors: Mapping[str, Tensor], origin: str) -> list[FileModule]:
    """Return the tensors of a file by module.

    Raises:
        BindError: a key ends in no known leaf, or two in the same.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        split = split_key(key)
        if split is None:
            raise BindError(f"{origin}: {key} is no tensor of an adapter.", hint="Is the file whole, and of this kind?")
        module, leaf = split
        if leaf in modules.setdefault(module, {}):
            raise BindError(f"{origin}: {module} has {leaf} twice.", hint="The file is a mixture of two.")
        modules[module][leaf] = tensor
    return [FileModule(name, leaves) for name, leaves in modules.items()]


# -- from a file ---------------------------------------------------------------------------------------------


def check_methods(modules: Iterable[FileModule], origin: str) -> None:
    """Refuse tensors of methods that PEFT has not.

    Raises:
        UnsupportedError: there are some.
    """
    for module in modules:
        foreign = next((leaf for leaf in module.leaves if leaf in _FOREIGN), None)
        if foreign is not None:
            raise UnsupportedError(f"{origin}: {module.name}.{foreign} is of {_FOREIGN[foreign]}.", hint=_ELSEWHERE)


def change_in(module: FileModule, shape: tuple[int, ...], origin: str) -> ModuleChange:
    """Return the change that a file has for a module of the network, under the module's name there.

    Args:
        module: its tensors.
        shape: the shape of its weight.
        origin: the file, for errors.

    Raises:
        UnsupportedError: PEFT has no such factors. BindError: tensors are missing, or of other shapes.
    """
    leaves = module.leaves
    if _ON_INPUT in leaves or _IA3 in leaves:
        return _ia3(module, shape, origin)
    if any(leaf in leaves for leaf in _LOHA):
        change = _of_rank(module, "LOHA", _LOHA, "hada_w1_b", origin)
    elif any(leaf in leaves for leaf in _LOKR):
        change = _lokr(module, origin)
    else:
        return _lora(module, shape, origin)
    if "dora_scale" in leaves:
        raise UnsupportedError(
            f"{origin}: {module.name} is {change.method} with magnitudes (dora_scale); PEFT has them for LoRA alone.",
            hint=_ELSEWHERE,
        )
    return change


def unscaled_change(module: FileModule, origin: str) -> ModuleChange:
    """Return the change that a file has for a module under PEFT's shapes, whose scale is 1 where it has no alpha.

    Raises:
        UnsupportedError: PEFT has no such factors. BindError: tensors are missing, or do not fit each other.
    """
    up = module.leaves.get("lora_up.weight")
    down = module.leaves.get("lora_down.weight")
    shape = (0, 0) if up is None or down is None else (up.shape[0], *down.shape[1:])
    return change_in(module, shape, origin)


def _alpha(module: FileModule, rank: int) -> float:
    """Return a module's alpha; one that is absent or zero means the rank."""
    alpha = module.leaves.get("alpha")
    return float(alpha) or float(rank) if alpha is not None else float(rank)


def _of_rank(module: FileModule, method: str, names: tuple[str, ...], ranked: str, origin: str) -> ModuleChange:
    leaves = {name: module.leaves[name] for name in names if name in module.leaves}
    missing = [name for name in names[:4] if name not in leaves] or (
        [] if ("hada_t1" in leaves) == ("hada_t2" in leaves) else ["one of hada_t1 and hada_t2"]
    )
    if missing:
        raise _missing(module, missing[0], origin)
    rank = leaves[ranked].shape[0]
    return ModuleChange(module.name, method, leaves, rank, _alpha(module, rank) / rank)


def _missing(module: FileModule, leaf: str, origin: str) -> BindError:
    return BindError(f"{origin}: {module.name} has no {leaf}.", hint="Copy the file again; it is not whole.")


def _lora(module: FileModule, shape: tuple[int, ...], origin: str) -> ModuleChange:
    leaves = module.leaves
    for leaf in _LORA[:2]:
        if leaf not in leaves:
            raise _missing(module, leaf, origin)
    down, up = leaves["lora_down.weight"], leaves["lora_up.weight"]
    if "lora_mid.weight" in leaves:
        down = _composed(leaves["lora_mid.weight"], down)
    rank = up.shape[1] if up.ndim > 1 else 0
    wanted = (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))
    if (down.numel(), up.numel()) != tuple(map(math.prod, wanted)) or down.shape[0] != rank or up.shape[0] != shape[0]:
        raise BindError(
            f"{origin}: {module.name} has factors of shapes {list(up.shape)} and {list(down.shape)}, and the base's "
            f"weight is {list(shape)}.",
            hint="Give the base that it was trained on.",
        )
    # A convolution of one point and a linear layer are the same, and files have the one for the other.
    factors = {"lora_A.weight": down.reshape(wanted[0]), "lora_B.weight": up.reshape(wanted[1])}
    if _BIAS in leaves:
        factors[_BIAS] = leaves[_BIAS]
    if "dora_scale" in leaves:
        factors["lora_magnitude_vector"] = _magnitudes(module, shape, origin)
    return ModuleChange(module.name, "LORA", factors, rank, _alpha(module, rank) / rank)


def _composed(core: Tensor, down: Tensor) -> Tensor:
    """Return the convolution that a Tucker decomposition's core ``(r, r, h, w)`` and ``(r, in, 1, 1)`` make."""
    inputs = down.flatten(1).double()
    return torch.einsum("pqkl,qi->pikl", core.double(), inputs).float()


def _magnitudes(module: FileModule, shape: tuple[int, ...], origin: str) -> Tensor:
    scale = module.leaves["dora_scale"]
    if (
        scale.numel() != shape[0]
        or scale.shape[0] not in (shape[0], 1)
        or (scale.ndim == 2 and scale.shape[0] != shape[0])
    ):
        raise UnsupportedError(
            f"{origin}: {module.name}.dora_scale is {list(scale.shape)}, a norm for each input: an early DoRA of "
            "LyCORIS (wd_on_out=False), which PEFT has not.",
            hint=_ELSEWHERE,
        )
    return scale.reshape(1, -1, *(1 for _ in shape[2:])) if len(shape) > 2 else scale.flatten()


def _lokr(module: FileModule, origin: str) -> ModuleChange:
    leaves = {name: module.leaves[name] for name in _LOKR if name in module.leaves}
    for whole, *parts in (("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b")):
        if whole not in leaves and any(part not in leaves for part in parts):
            raise _missing(module, whole, origin)
    is_whole = "lokr_w1" in leaves and "lokr_w2" in leaves
    if is_whole:
        # The rank is in none of them, and readers take the scale to be 1 whatever alpha says.
        return ModuleChange(
            module.name, "LOKR", leaves, max(max(leaves[n].shape[:2]) for n in ("lokr_w1", "lokr_w2")), 1.0
        )
    ranks = {leaves[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in leaves}
    if len(ranks) > 1:
        raise UnsupportedError(f"{origin}: the two factors of {module.name} are of two ranks.", hint=_ELSEWHERE)
    rank = ranks.pop()
    return ModuleChange(module.name, "LOKR", leaves, rank, _alpha(module, rank) / rank)


def _ia3(module: FileModule, shape: tuple[int, ...], origin: str) -> ModuleChange:
    for leaf in (_IA3, _ON_INPUT):
        if leaf not in module.leaves:
            raise _missing(module, leaf, origin)
    is_on_input = bool(module.leaves[_ON_INPUT])
    weight = module.leaves[_IA3]
    size = shape[1] if is_on_input else shape[0]
    if weight.numel() != size:
        raise BindError(
            f"{origin}: {module.name}.weight is {list(weight.shape)}, and the base's layer has {size}.",
            hint="Give the base that it was trained on.",
        )
    scale = (1 + weight.double()).float()
    points = [1 for _ in shape[2:]]
    rows = (1, size, *points) if is_on_input or points else (size, 1)
    return ModuleChange(module.name, "IA3", {"ia3_l": scale.reshape(rows)}, 0, 1.0)


# -- to a file -----------------------------------------------------------------------------------------------


def file_leaves(change: ModuleChange, is_on_input: bool) -> dict[str, Tensor]:
    """Return kohya's or LyCORIS' tensors of a change whose scale is not zero.

    Args:
        change: the change.
        is_on_input: for (IA)3, True where it scales the inputs.
    """
    if change.method == "IA3":
        scale = change.leaves["ia3_l"]
        weight = (scale.double() - 1).float()
        return {_IA3: weight if scale.ndim > 2 else weight.flatten(), _ON_INPUT: torch.tensor(int(is_on_input))}
    alpha = {"alpha": torch.tensor(effective_alpha(change), dtype=torch.float32)}
    if change.method != "LORA":
        return {**change.leaves, **alpha}
    leaves = {
        "lora_down.weight": change.leaves["lora_A.weight"],
        "lora_up.weight": change.leaves["lora_B.weight"],
        **alpha,
    }
    magnitudes = change.leaves.get("lora_magnitude_vector")
    if magnitudes is not None:
        points = (1 for _ in change.leaves["lora_A.weight"].shape[1:])
        leaves["dora_scale"] = magnitudes.reshape(-1, *points)
    return leaves


def is_whole_lokr(change: ModuleChange) -> bool:
    """Tell whether a LoKr has both factors whole, which makes readers take its scale to be 1."""
    return {"lokr_w1", "lokr_w2"} <= change.leaves.keys()


def renamed(change: ModuleChange, path: str) -> ModuleChange:
    """Return a change under another path."""
    return replace(change, path=path)
