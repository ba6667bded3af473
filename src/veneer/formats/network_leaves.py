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
from veneer.formats.table import MERGE_ELSEWHERE

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
_MAGNITUDES = ("dora_scale", "lora_magnitude_vector")
_ON_INPUT, _IA3, _BIAS = "on_input", "weight", "lora_B.bias"
# Leaves that may be whole numbers.
_NUMBERS = ("alpha", _ON_INPUT)
_LEAVES = sorted(
    (*_SPELLINGS, *_LORA, *_LOHA, *_LOKR, *_FOREIGN, *_MAGNITUDES, "alpha", _ON_INPUT, _IA3, _BIAS),
    key=len,
    reverse=True,
)

_DAMAGED = "Copy the file again; it is damaged."


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
        if not tensor.is_floating_point() and leaf not in _NUMBERS:
            raise BindError(
                f"{origin}: {key} holds {tensor.dtype} numbers.", hint="A quantised file is no adapter; copy it again."
            )
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
            raise UnsupportedError(
                f"{origin}: {module.name}.{foreign} is of {_FOREIGN[foreign]}.", hint=f"{MERGE_ELSEWHERE}."
            )


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
    if any(leaf in leaves for leaf in (*_LOHA, *_LOKR)) and any(leaf in leaves for leaf in _MAGNITUDES):
        raise UnsupportedError(
            f"{origin}: {module.name} is LoHa or LoKr with magnitudes (dora_scale); PEFT has them for LoRA alone.",
            hint=f"{MERGE_ELSEWHERE}.",
        )
    if any(leaf in leaves for leaf in _LOHA):
        return _loha(module, shape, origin)
    return _lokr(module, shape, origin) if any(leaf in leaves for leaf in _LOKR) else _lora(module, shape, origin)


def scales_inputs(module: FileModule) -> bool:
    """Tell whether a module has an (IA)3 that scales its inputs."""
    return _ON_INPUT in module.leaves and bool(module.leaves[_ON_INPUT].any())


def unscaled_change(module: FileModule, origin: str) -> ModuleChange:
    """Return the change that a file has for a module under PEFT's shapes, whose scale is 1 where it has no alpha.

    Raises:
        UnsupportedError: PEFT has no such factors. BindError: tensors are missing, or do not fit each other.
    """
    up = module.leaves.get("lora_up.weight")
    down = module.leaves.get("lora_down.weight")
    shape = (0, 0) if up is None or down is None else (up.shape[0], *down.shape[1:])
    return change_in(module, shape, origin)


def _scale(module: FileModule, rank: int, origin: str) -> float:
    """Return a module's scale; an alpha that is absent or zero means the rank."""
    alpha = module.leaves.get("alpha")
    if alpha is None:
        return 1.0
    if alpha.numel() != 1 or not math.isfinite(float(alpha)):
        raise BindError(f"{origin}: {module.name}.alpha is no number.", hint=_DAMAGED)
    return (float(alpha) or rank) / rank


def _require(module: FileModule, names: Iterable[str], origin: str) -> None:
    """Raise ``BindError`` when a module lacks one of some leaves."""
    missing = next((name for name in names if name not in module.leaves), None)
    if missing is not None:
        raise BindError(f"{origin}: {module.name} has no {missing}.", hint="Copy the file again; it is not whole.")


def _check_shapes(module: FileModule, shapes: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Raise ``BindError`` when leaves are of other shapes than the base's weight and their rank make them."""
    for name, shape in shapes.items():
        actual = tuple(module.leaves[name].shape)
        if actual != shape or 0 in shape:
            raise BindError(
                f"{origin}: {module.name}.{name} is {list(actual)}; beside the base and its own rank it would be "
                f"{list(shape)}.",
                hint="Give the base that it was trained on.",
            )


def _size(tensor: Tensor, dimension: int) -> int:
    """Return a size of a tensor; 0 where it has not that many dimensions."""
    return tensor.shape[dimension] if tensor.ndim > dimension else 0


def _lora(module: FileModule, shape: tuple[int, ...], origin: str) -> ModuleChange:
    leaves = module.leaves
    _require(module, _LORA[:2], origin)
    down, up = leaves["lora_down.weight"], leaves["lora_up.weight"]
    rank, points = _size(up, 1), tuple(1 for _ in shape[2:])
    if "lora_mid.weight" in leaves:
        _check_shapes(module, {"lora_mid.weight": (rank, rank, *shape[2:])}, origin)
        down = _composed(leaves["lora_mid.weight"], down, shape[1])
    # A convolution of one point and a linear layer are the same, and files have the one for the other.
    matrices = {"lora_A.weight": (rank, *shape[1:]), "lora_B.weight": (shape[0], rank, *points)}
    sizes = tuple(math.prod(matrix) for matrix in matrices.values())
    if not rank or (down.numel(), up.numel()) != sizes or (_size(down, 0), _size(up, 0)) != (rank, shape[0]):
        raise BindError(
            f"{origin}: {module.name} has factors of shapes {list(up.shape)} and {list(down.shape)}, and the base's "
            f"weight is {list(shape)}.",
            hint="Give the base that it was trained on.",
        )
    factors = {name: tensor.reshape(matrices[name]) for name, tensor in zip(matrices, (down, up), strict=True)}
    if _BIAS in leaves:
        _check_shapes(module, {_BIAS: shape[:1]}, origin)
        factors[_BIAS] = leaves[_BIAS]
    if any(leaf in leaves for leaf in _MAGNITUDES):
        factors["lora_magnitude_vector"] = _magnitudes(module, shape, origin)
    return ModuleChange(module.name, "LORA", factors, rank, _scale(module, rank, origin))


def _composed(core: Tensor, down: Tensor, inputs: int) -> Tensor:
    """Return the convolution that a Tucker decomposition's core ``(r, r, h, w)`` and ``(r, in, 1, 1)`` make."""
    if down.numel() != core.shape[1] * inputs:
        return down  # whose shape is then found wrong
    return torch.einsum("pqkl,qi->pikl", core.double(), down.reshape(-1, inputs).double()).float()


def _magnitudes(module: FileModule, shape: tuple[int, ...], origin: str) -> Tensor:
    in_peft = (1, shape[0], *(1 for _ in shape[2:])) if len(shape) > 2 else shape[:1]
    if "lora_magnitude_vector" in module.leaves:
        _check_shapes(module, {"lora_magnitude_vector": in_peft}, origin)
        return module.leaves["lora_magnitude_vector"]
    scale = module.leaves["dora_scale"]
    if scale.numel() != shape[0] or _size(scale, 0) != shape[0]:
        raise UnsupportedError(
            f"{origin}: {module.name}.dora_scale is {list(scale.shape)}, no norm for each of {shape[0]} outputs; early "
            "DoRA of LyCORIS (wd_on_out=False) had one for each input, which PEFT has not.",
            hint=f"{MERGE_ELSEWHERE}.",
        )
    return scale.reshape(in_peft)


def _loha(module: FileModule, shape: tuple[int, ...], origin: str) -> ModuleChange:
    leaves = {name: module.leaves[name] for name in _LOHA if name in module.leaves}
    cores = [name for name in _LOHA[4:] if name in leaves]
    _require(module, _LOHA if cores else _LOHA[:4], origin)
    out, inner, *kernel = shape
    rank = _size(leaves["hada_w1_b"], 0)
    first, second = ((rank, out), (rank, inner)) if cores else ((out, rank), (rank, inner * math.prod(kernel)))
    shapes = {name: first if name.endswith("a") else second for name in _LOHA[:4]}
    _check_shapes(module, {**shapes, **dict.fromkeys(cores, (rank, rank, *kernel))}, origin)
    return ModuleChange(module.name, "LOHA", leaves, rank, _scale(module, rank, origin))


def _lokr(module: FileModule, shape: tuple[int, ...], origin: str) -> ModuleChange:
    leaves = {name: module.leaves[name] for name in _LOKR if name in module.leaves}
    for whole, *halves in (_LOKR[:3], _LOKR[3:6]):
        _require(module, halves if any(half in leaves for half in halves) else [whole], origin)
    rows, columns = (("lokr_w1", 0), ("lokr_w1", 1)) if "lokr_w1" in leaves else (("lokr_w1_a", 0), ("lokr_w1_b", 1))
    first = _size(leaves[rows[0]], rows[1]), _size(leaves[columns[0]], columns[1])
    parts = [leaves[name] for name in ("lokr_w1_b", "lokr_w2_b") if name in leaves]
    rank = _size(parts[0], 0) if parts else 0
    shapes = _lokr_shapes(shape, first, rank, "lokr_t2" in leaves)
    _check_shapes(module, {name: shapes[name] for name in leaves}, origin)
    if parts:
        return ModuleChange(module.name, "LOKR", leaves, rank, _scale(module, rank, origin))
    # The rank is in none of them, and readers take the scale to be 1 whatever alpha says.
    return ModuleChange(module.name, "LOKR", leaves, max(*leaves["lokr_w1"].shape, *leaves["lokr_w2"].shape[:2]), 1.0)


def _lokr_shapes(
    shape: tuple[int, ...], first: tuple[int, int], rank: int, has_core: bool
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of LoKr's tensors beside a weight.

    Args:
        shape: the weight's.
        first: the rows and columns of the first factor.
        rank: the rank of factors that are products.
        has_core: True for a Tucker decomposition.
    """
    out, inner, *kernel = shape
    (a, c), (b, d) = first, (out // (first[0] or 1), inner // (first[1] or 1))
    second = ((rank, b), (rank, d)) if has_core else ((b, rank), (rank, d * math.prod(kernel)))
    return {
        "lokr_w1": (a, c),
        "lokr_w1_a": (a, rank),
        "lokr_w1_b": (rank, c),
        "lokr_w2": (b, d, *kernel),
        "lokr_w2_a": second[0],
        "lokr_w2_b": second[1],
        "lokr_t2": (rank, rank, *kernel),
    }


def _ia3(module: FileModule, shape: tuple[int, ...], origin: str) -> ModuleChange:
    _require(module, (_IA3, _ON_INPUT), origin)
    if module.leaves[_ON_INPUT].numel() != 1:
        raise BindError(f"{origin}: {module.name}.{_ON_INPUT} is no number.", hint=_DAMAGED)
    weight, is_on_input = module.leaves[_IA3], scales_inputs(module)
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
