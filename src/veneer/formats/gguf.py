"""GGUF adapters: what llama.cpp, Ollama and LM Studio load beside a GGUF model.

A file holds ``<weight>.lora_a`` and ``<weight>.lora_b``, in PEFT's own orientation, and one alpha that is divided by
the rank of each pair. Names and rows are those of the base's GGUF file: :mod:`veneer.formats.gguf_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import (
    BaseMismatchError,
    BaseModelError,
    BindError,
    CorruptFileError,
    UnsupportedError,
    UsageError,
)
from veneer.files.atomic_write import atomic_write
from veneer.files.gguf_header import SUFFIX, GgufHeader, is_gguf, read_gguf_header
from veneer.files.json_file import COPY_AGAIN
from veneer.files.names import ADAPTER_CONFIG
from veneer.files.source import Source
from veneer.formats import original_config
from veneer.formats.base_facts import named_base
from veneer.formats.canonical import CanonicalAdapter, ModuleChange
from veneer.formats.format import Base, ReadOptions, Step
from veneer.formats.gguf_weights import EMBEDDING, HEAD, ROUTER, Architecture, Weight, architecture_of, weights_of
from veneer.packages import require

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

_A, _B = ".lora_a", ".lora_b"
_HUB = "https://huggingface.co/"
# The beginning of the keys of an adapter's own metadata, of which other readers take no notice.
_OWN = "veneer.metadata."
_INVOCATION = "alora_invocation_tokens"
_FILE = f"adapter{SUFFIX}"


class GgufFormat:
    """Reads and writes LoRA adapters as GGUF files."""

    name: ClassVar[str] = "gguf"
    title: ClassVar[str] = "GGUF"
    reads: ClassVar[bool] = True
    writes: ClassVar[bool] = True

    def recognise(self, source: Source) -> bool:
        """Tell by first bytes and the header of a file; a folder with PEFT's config is PEFT's, whatever else it has."""
        if source.file is not None:
            return is_gguf(source.file) and is_adapter(read_gguf_header(source.file))
        return not source.has(ADAPTER_CONFIG) and bool(_adapter_headers(source))

    def read(self, source: Source, options: ReadOptions) -> Mapping[str, CanonicalAdapter]:
        """Read a file, or the one in a folder; its names and rows need the base."""
        header = adapter_header(source)
        base = _checked_base(options.base or named_base(base_name(header), source), header)
        pairs = _pairs(header)
        placed = _placed(pairs, weights_of(base), header, base)
        tensors = _read_tensors(header)
        alpha = _alpha(header)
        factors = [_factors(weight, name, tensors, alpha) for name, weight in placed.items()]
        modules = [_change(group) for group in _by_parameter(factors)]
        return {"": _adapter(header, {change.path: change for change in modules}, base)}

    def write(self, adapters: Mapping[str, CanonicalAdapter], target: Path, base: Base | None) -> list[Step]:
        """Write a file, or a folder with one where ``target`` does not end in ``.gguf``."""
        from veneer.formats.scaling import fitted

        if list(adapters) != [""]:
            raise UnsupportedError(
                f"A GGUF file holds the adapter of one language model, and this one has parts: {', '.join(adapters)}.",
                hint="Name the part with --component.",
            )
        if base is None:
            raise _base_needed()
        fit = fitted(adapters[""], self.name, self.title)
        weights = _weights_for(fit.adapter, base)
        tensors = {
            name: tensor
            for path, change in fit.adapter.modules.items()
            for weight in weights[path]
            for name, tensor in _tensors(change, weight).items()
        }
        own = {f"{_OWN}{key}": value for key, value in adapters[""].metadata.items() if key != original_config.KEY}
        values = own | original_config.metadata_of(adapters[""])
        path = target if target.suffix == SUFFIX else target / _FILE
        with atomic_write(path) as temporary:
            _write(temporary, architecture_of(base), fit.alpha, fit.adapter, values, tensors)
        return fit.steps


@dataclass(frozen=True)
class _Factors:
    """The factors of one weight as PEFT's rows have them: ``(r, in)`` and ``(out, r)``, or stacks of them."""

    weight: Weight
    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """The rank."""
        return self.up.shape[-1]


# Reading


def is_adapter(header: GgufHeader) -> bool:
    """Tell whether a GGUF file says that it is an adapter, and no model."""
    return header.values.get("general.type") == "adapter"


def _adapter_headers(source: Source) -> list[GgufHeader]:
    """Read the headers of the adapters that a source is or holds."""
    names = [name for name in source.files() if name.endswith(SUFFIX)]
    paths = [source.path(name) for name in names] if source.file is None else [source.file]
    return [header for header in map(read_gguf_header, paths) if is_adapter(header)]


def adapter_header(source: Source) -> GgufHeader:
    """Read the header of the one adapter that a source is or holds.

    Raises:
        UsageError: there are several. UnsupportedError: it is no LoRA.
    """
    headers = _adapter_headers(source)
    if len(headers) != 1:
        names = ", ".join(header.path.name for header in headers)
        raise UsageError(f"{source.origin} holds several GGUF adapters: {names}.", hint="Give the file itself.")
    kind = headers[0].values.get("adapter.type")
    if kind != "lora":
        raise UnsupportedError(
            f"{headers[0].path} is a GGUF adapter of the type {kind!r}.", hint="Only LoRA adapters (lora) are known."
        )
    return headers[0]


def _checked_base(base: Base | None, header: GgufHeader) -> Base:
    """Return the base; refuse one of another architecture than the file was made for."""
    if base is None:
        named = base_name(header)
        raise _base_needed(f" The file was made for {named}." if named else "")
    wanted, present = header.values.get("general.architecture"), architecture_of(base).name
    if wanted != present:
        raise BaseMismatchError(
            f"{header.path} is for a base of the architecture {wanted!r}, and {base.origin} is {present!r}.",
            hint="Give the base that the adapter was trained on: --base.",
        )
    return base


def _base_needed(more: str = "") -> BaseModelError:
    return BaseModelError(
        f"A GGUF file has llama.cpp's names and order of rows, which only the base can translate.{more}",
        hint="Give the base, as transformers has it: --base FOLDER_OR_HUB_ID (base=...).",
    )


def base_name(header: GgufHeader) -> str | None:
    """Return the hub id of the base that a file names."""
    address = header.values.get("general.base_model.0.repo_url")
    return address.removeprefix(_HUB).strip("/") if isinstance(address, str) and address.startswith(_HUB) else None


def _pairs(header: GgufHeader) -> list[str]:
    """Return the names of the weights that a file has factors for.

    Raises:
        BindError: a tensor is none of a pair.
    """
    names = [name[: -len(_A)] for name in header.tensors if name.endswith(_A)]
    paired = {name + ending for name in names for ending in (_A, _B)}
    problems = [f"{name}: missing" for name in paired if name not in header.tensors]
    problems += [f"{name}: no factor of a LoRA" for name in header.tensors if name not in paired and not _is_norm(name)]
    if problems or not names:
        raise BindError(
            f"{header.path} is no whole adapter: {(problems or ['it has no tensors'])[0]}.",
            problems=sorted(problems),
            hint=COPY_AGAIN,
        )
    return names


def _is_norm(name: str) -> bool:
    """Tell whether llama.cpp passes over a tensor of that name."""
    return name.endswith("_norm.weight")


def _placed(names: Sequence[str], weights: Sequence[Weight], header: GgufHeader, base: Base) -> dict[str, Weight]:
    """Return the weight of the base for each name, after a check of the factors' shapes.

    Raises:
        BindError: the base has no such weight, or the factors do not fit it.
    """
    by_name = {weight.name: weight for weight in weights}
    problems = [f"{name}: not in the base" for name in names if name not in by_name]
    for name in names:
        a, b = header.tensors[name + _A].shape, header.tensors[name + _B].shape
        if name in by_name and (a, b) != _shapes(by_name[name], b[-1]):
            problems.append(f"{name}: factors of the shapes {a} and {b} for a weight of {by_name[name].shape}")
    if problems:
        raise BindError(
            f"{header.path} does not fit {base.origin}: {problems[0]}.",
            problems=problems,
            hint="Give the base that the adapter was trained on: --base.",
        )
    return {name: by_name[name] for name in names}


def _shapes(weight: Weight, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes that the factors of a weight have in a file."""
    *experts, rows, columns = weight.shape
    if weight.name == EMBEDDING:
        return (rows, rank), (columns, rank)
    return (*experts, rank, columns), (*experts, rows, rank)


def _read_tensors(header: GgufHeader) -> dict[str, Tensor]:
    """Read all tensors of a file; of quantised ones the values, in float32."""
    require("A GGUF file", "gguf", extra="gguf")
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

    for tensor in header.tensors.values():
        known = tensor.kind in list(GGMLQuantizationType)
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)] if known else (1, 0)
        *rows, row = tensor.shape
        length = row // block * size
        for number in rows:
            length *= number
        if not known or row % block or tensor.start + length > header.size:
            what = "is cut off" if known else f"has the unknown type {tensor.kind}"
            raise CorruptFileError(f"{header.path} is damaged: {tensor.name!r} {what}.", hint=COPY_AGAIN)
    return {tensor.name: _as_torch(tensor, header) for tensor in GGUFReader(header.path).tensors}


def _as_torch(tensor: Any, header: GgufHeader) -> Tensor:
    import numpy
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = tensor.tensor_type
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return torch.from_numpy(numpy.array(tensor.data))
    if kind == GGMLQuantizationType.BF16:
        return torch.from_numpy(numpy.array(tensor.data).view(numpy.int16)).view(torch.bfloat16)
    try:
        return torch.from_numpy(dequantize(tensor.data, kind))
    except NotImplementedError as error:
        raise UnsupportedError(
            f"{header.path}: {tensor.name!r} is {kind.name}, which the package gguf cannot read.",
            hint="Write the adapter again as F32, F16, BF16 or Q8_0.",
        ) from error


def _alpha(header: GgufHeader) -> float:
    alpha = header.values.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float):
        raise CorruptFileError(f"{header.path} is damaged: its alpha is {alpha!r}, no float.", hint=COPY_AGAIN)
    return alpha


def _factors(weight: Weight, name: str, tensors: Mapping[str, Tensor], alpha: float) -> _Factors:
    """Return the factors of a weight, its rows as in the base. An alpha of 0 means a scale of 1."""
    down, up = tensors[name + _A], tensors[name + _B]
    if weight.heads:
        up = _half_a_head_apart(up, weight.heads)
    return _Factors(weight, down, up, alpha / up.shape[-1] if alpha else 1.0)


def _by_parameter(factors: Sequence[_Factors]) -> list[list[_Factors]]:
    groups: dict[str, list[_Factors]] = {}
    for each in factors:
        groups.setdefault(each.weight.parameter, []).append(each)
    return list(groups.values())


def _change(group: Sequence[_Factors]) -> ModuleChange:
    """Return the change of a parameter from the factors of its weight, or of its halves."""
    first = group[0] if group[0].weight.half is None else _joined(group)
    weight, rank = first.weight, first.rank
    path = weight.parameter
    if weight.name == EMBEDDING:
        leaves = {"lora_embedding_A": first.down.T.contiguous(), "lora_embedding_B": first.up}
        return ModuleChange(path.removesuffix(".weight"), "LORA", leaves, rank, first.scale)
    # The experts lie apart in A and interleaved in B: (experts * r, in) and (out, r * experts).
    is_stack = first.up.ndim == 3
    down = first.down.flatten(0, 1) if is_stack else first.down
    up = first.up.permute(1, 2, 0).flatten(1) if is_stack else first.up
    is_parameter = is_stack or weight.kind == ROUTER
    leaves = {"lora_A.weight": down, "lora_B.weight": up.contiguous()}
    return ModuleChange(
        path if is_parameter else path.removesuffix(".weight"), "LORA", leaves, rank, first.scale, is_parameter
    )


def _joined(halves: Sequence[_Factors]) -> _Factors:
    """Return the factors of a parameter from those of its upper and lower half, of which one may be missing."""
    import torch

    by_half = {each.weight.half: each for each in halves}
    one = halves[0]
    if len(halves) == 1:
        zeros = torch.zeros_like(one.up)
        return replace(one, up=torch.cat([one.up, zeros] if one.weight.half == 0 else [zeros, one.up], -2))
    upper, lower = by_half[0], by_half[1]
    if torch.equal(upper.down, lower.down):
        return replace(upper, up=torch.cat([upper.up, lower.up], -2))
    # With an A of its own each half keeps its ranks to itself, which are zero for the other.
    scaled = lower.up if lower.scale == upper.scale else lower.up.float() * (lower.scale / upper.scale)
    dtype = torch.promote_types(upper.up.dtype, scaled.dtype)
    up = torch.zeros(*upper.up.shape[:-2], upper.up.shape[-2] + scaled.shape[-2], upper.rank + lower.rank, dtype=dtype)
    up[..., : upper.up.shape[-2], : upper.rank] = upper.up
    up[..., upper.up.shape[-2] :, upper.rank :] = scaled
    return replace(upper, down=torch.cat([upper.down, lower.down], -2), up=up)


def _adapter(header: GgufHeader, modules: Mapping[str, ModuleChange], base: Base) -> CanonicalAdapter:
    from veneer.formats.peft_layout import laid_out

    values = {key: value for key, value in header.values.items() if isinstance(value, str)}
    metadata = {key.removeprefix(_OWN): value for key, value in values.items() if key.startswith(_OWN)}
    metadata |= {key: value for key, value in values.items() if key == original_config.KEY}
    notes = [f"{name}: left out, as llama.cpp passes over it too" for name in header.tensors if _is_norm(name)]
    adapter = CanonicalAdapter(modules, base=base_name(header), metadata=metadata, notes=tuple(notes))
    tokens = header.values.get("adapter.alora.invocation_tokens")
    if not tokens:
        return adapter
    return replace(adapter, config={**laid_out(adapter, base)[0].to_dict(), _INVOCATION: list(tokens)}, metadata={})


# Writing


def _weights_for(adapter: CanonicalAdapter, base: Base) -> dict[str, list[Weight]]:
    """Return the weights of a GGUF file that each module's change goes into.

    Raises:
        UnsupportedError: a module has no weight there to which llama.cpp adds a LoRA. BindError: it does not fit.
    """
    by_parameter: dict[str, list[Weight]] = {}
    for weight in weights_of(base):
        by_parameter.setdefault(weight.parameter, []).append(weight)
    architecture = architecture_of(base)
    weights = {}
    for path, change in adapter.modules.items():
        parameter = path if path in base.shapes else f"{path}.weight"
        if parameter not in base.shapes:
            raise BindError(
                f"{base.origin} has no module {path}, which the adapter changes.",
                hint="Give the base that the adapter was trained on: --base.",
            )
        weights[path] = by_parameter.get(parameter, [])
        _check_held(path, parameter, weights[path], architecture, base)
        _check_shapes(change, weights[path][0], base)
    return weights


def _check_held(path: str, parameter: str, weights: Sequence[Weight], architecture: Architecture, base: Base) -> None:
    """Refuse a module whose change llama.cpp does not compute."""
    merge = "Merge the adapter into the model, and convert that with llama.cpp: veneer merge ADAPTER --out NEW."
    if not weights:
        raise UnsupportedError(
            f"{path} is no weight to which llama.cpp adds a LoRA (architecture {architecture.name}).", hint=merge
        )
    is_tied = architecture.one_table or parameter in base.tied or parameter in base.tied.values()
    if weights[0].name in (EMBEDDING, HEAD) and is_tied:
        raise UnsupportedError(
            f"{path}: the embedding and the output head of {base.origin} are one weight in a GGUF file, where "
            "llama.cpp would take the LoRA for both.",
            hint=merge,
        )


def _check_shapes(change: ModuleChange, weight: Weight, base: Base) -> None:
    shapes = {leaf: tuple(tensor.shape) for leaf, tensor in change.leaves.items()}
    if shapes != _leaf_shapes(weight, change.rank):
        raise BindError(
            f"{change.path}: factors of the shapes {', '.join(map(str, shapes.values()))} do not fit {base.origin}, "
            f"where the weight is {base.shapes[weight.parameter]}.",
            hint="Give the base that the adapter was trained on: --base.",
        )


def _leaf_shapes(weight: Weight, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of PEFT's leaves on the parameter of a weight, by their names."""
    *experts, rows, columns = weight.shape
    if weight.name == EMBEDDING:
        return {"lora_embedding_A": (rank, rows), "lora_embedding_B": (columns, rank)}
    ranks = rank * (experts[0] if experts else 1)
    return {"lora_A.weight": (ranks, columns), "lora_B.weight": (rows * (1 if weight.half is None else 2), ranks)}


def _tensors(change: ModuleChange, weight: Weight) -> dict[str, Tensor]:
    """Return the tensors of a change for one weight, by their names in the file."""
    down, up = _stacked_factors(change, weight)
    if weight.half is not None:
        up = up.chunk(2, -2)[weight.half]
    if weight.heads:
        up = _side_by_side(up, weight.heads)
    return {weight.name + _A: down, weight.name + _B: up}


def _stacked_factors(change: ModuleChange, weight: Weight) -> tuple[Tensor, Tensor]:
    """Return a change's factors as a file has them, all rows of the parameter and in the base's order."""
    if weight.name == EMBEDDING:
        return change.leaves["lora_embedding_A"].T, change.leaves["lora_embedding_B"]
    down, up = change.leaves["lora_A.weight"], change.leaves["lora_B.weight"]
    if len(weight.shape) == 2:
        return down, up
    experts = weight.shape[0]
    return down.unflatten(0, (experts, -1)), up.unflatten(1, (-1, experts)).permute(2, 0, 1)


def _side_by_side(up: Tensor, heads: int) -> Tensor:
    """Bring the two rows that a rotation turns together side by side, from half a head apart."""
    return up.reshape(heads, 2, -1, up.shape[-1]).transpose(1, 2).reshape(up.shape)


def _half_a_head_apart(up: Tensor, heads: int) -> Tensor:
    """Bring the two rows that a rotation turns together half a head apart, from side by side."""
    return up.reshape(heads, -1, 2, up.shape[-1]).transpose(1, 2).reshape(up.shape)


def _write(
    path: Path,
    architecture: Architecture,
    alpha: float,
    adapter: CanonicalAdapter,
    values: Mapping[str, str],
    tensors: Mapping[str, Tensor],
) -> None:
    from gguf import GGUFType, GGUFValueType, GGUFWriter, Keys

    writer = GGUFWriter(path, architecture.name)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    tokens = (adapter.config or {}).get(_INVOCATION)
    if tokens:
        writer.add_key_value(Keys.Adapter.ALORA_INVOCATION_TOKENS, tokens, GGUFValueType.ARRAY, GGUFValueType.UINT32)
    if adapter.base:
        _add_base(writer, adapter.base)
    for key, value in values.items():
        writer.add_string(key, value)
    for name, tensor in tensors.items():
        _add_tensor(writer, name, tensor)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_base(writer: GGUFWriter, base: str) -> None:
    from veneer.files.resolve import looks_like_hub_id

    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base.rpartition("/")[2])
    if looks_like_hub_id(base) and not Path(base).exists():
        writer.add_base_model_repo_url(0, _HUB + base)


def _add_tensor(writer: GGUFWriter, name: str, tensor: Tensor) -> None:
    """Add a tensor in its own dtype; one that GGUF files do not have becomes float32."""
    import torch
    from gguf import GGMLQuantizationType

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=GGMLQuantizationType.BF16)
    else:
        kept = tensor if tensor.dtype in (torch.float32, torch.float16) else tensor.float()
        writer.add_tensor(name, kept.numpy())
