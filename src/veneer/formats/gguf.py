"""GGUF adapters: what llama.cpp, Ollama and LM Studio load beside a GGUF model.

A file holds ``<weight>.lora_a`` and ``<weight>.lora_b``, in PEFT's own orientation, and one alpha that is divided by
the rank of each pair. Names and rows are those of the base's GGUF file: :mod:`veneer.formats.gguf_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

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
from veneer.files.resolve import looks_like_hub_id
from veneer.files.source import Source
from veneer.formats import original_config
from veneer.formats.base_facts import named_base
from veneer.formats.canonical import CanonicalAdapter, ModuleChange
from veneer.formats.fit_to_base import check_fit, without_copies
from veneer.formats.format import Base, ReadOptions, Step
from veneer.formats.gguf_weights import EMBEDDING, FACTORS, HEAD, Weight, architecture_of, weights_of
from veneer.packages import require

_HUB = "https://huggingface.co/"
_BASE_NAME, _BASE_URL = "general.base_model.0.name", "general.base_model.0.repo_url"
# The beginning of the keys of an adapter's own metadata, of which other readers take no notice.
_OWN = "veneer.metadata."
_INVOCATION = "alora_invocation_tokens"
_FILE = f"adapter{SUFFIX}"
_MERGE = "Merge the adapter into the model, and convert that with llama.cpp: veneer merge ADAPTER --out NEW."


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
        require("A GGUF adapter", "gguf", extra="gguf")
        from veneer.formats.gguf_tensors import changes_of, read_tensors

        header = adapter_header(source)
        base = _checked_base(options.base or named_base(base_name(header), source), header)
        weights = _weights_in(header, base)
        changes = changes_of(weights, read_tensors(header), _alpha(header))
        return {"": _adapter(header, {change.path: change for change in changes}, base)}

    def write(self, adapters: Mapping[str, CanonicalAdapter], target: Path, base: Base | None) -> list[Step]:
        """Write a file, or a folder with one where ``target`` does not end in ``.gguf``."""
        require("A GGUF adapter", "gguf", extra="gguf")
        from veneer.formats.gguf_tensors import tensors_of, write_file
        from veneer.formats.scaling import fitted

        adapter, base = _of_one_model(adapters, base)
        adapter = without_copies(adapter, base)
        fit = fitted(adapter, self.name, self.title)
        weights = _weights_of(fit.adapter, base)
        tensors = [tensors_of(change, w) for path, change in fit.adapter.modules.items() for w in weights[path]]
        path = target if target.suffix == SUFFIX else target / _FILE
        with atomic_write(path) as temporary:
            write_file(
                temporary,
                architecture_of(base).name,
                fit.alpha,
                (adapter.config or {}).get(_INVOCATION),
                _texts(adapter),
                {name: tensor for each in tensors for name, tensor in each.items()},
            )
        return fit.steps


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
        hint="Give the base, a folder, a hub id or its GGUF file: --base BASE (base=...).",
    )


def base_name(header: GgufHeader) -> str | None:
    """Return the hub id of the base that a file names."""
    address = header.values.get(_BASE_URL)
    return address.removeprefix(_HUB).strip("/") if isinstance(address, str) and address.startswith(_HUB) else None


def _pairs(header: GgufHeader) -> list[str]:
    """Return the names of the weights that a file has factors for.

    Raises:
        BindError: a tensor is none of a pair.
    """
    down, _ = FACTORS
    names = [name.removesuffix(down) for name in header.tensors if name.endswith(down)]
    paired = {name + ending for name in names for ending in FACTORS}
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


def _weights_in(header: GgufHeader, base: Base) -> list[Weight]:
    """Return the weights of the base that a file has factors for, after a check of their shapes.

    Raises:
        BindError: the base has no such weight, or the factors do not fit it.
    """
    by_name = {weight.name: weight for weight in weights_of(base)}
    names = _pairs(header)
    problems = [f"{name}: not in the base" for name in names if name not in by_name]
    weights = [by_name[name] for name in names if name in by_name]
    for weight in weights:
        shapes = [header.tensors[weight.name + ending].shape for ending in FACTORS]
        if shapes != _shapes(weight, shapes[1][-1]):
            factors = " and ".join(map(str, shapes))
            problems.append(f"{weight.name}: factors of the shapes {factors} for a weight of {weight.shape}")
    if problems:
        raise BindError(
            f"{header.path} does not fit {base.origin}: {problems[0]}.",
            problems=problems,
            hint="Give the base that the adapter was trained on: --base.",
        )
    return weights


def _shapes(weight: Weight, rank: int) -> list[tuple[int, ...]]:
    """Return the shapes that the factors of a weight have in a file."""
    *experts, rows, columns = weight.shape
    if weight.name == EMBEDDING:
        return [(rows, rank), (columns, rank)]
    return [(*experts, rank, columns), (*experts, rows, rank)]


def _alpha(header: GgufHeader) -> float:
    alpha = header.values.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise CorruptFileError(f"{header.path} is damaged: its alpha is {alpha!r}.", hint=COPY_AGAIN)
    return alpha


def _adapter(header: GgufHeader, modules: Mapping[str, ModuleChange], base: Base) -> CanonicalAdapter:
    from veneer.formats.peft_layout import laid_out

    texts = {key: value for key, value in header.values.items() if isinstance(value, str)}
    metadata = {key.removeprefix(_OWN): text for key, text in texts.items() if key.startswith(_OWN)}
    config = {key: text for key, text in texts.items() if key == original_config.KEY}
    notes = tuple(f"{name}: left out, as llama.cpp passes over it too" for name in header.tensors if _is_norm(name))
    adapter = CanonicalAdapter(modules, base=base_name(header), metadata=metadata | config, notes=notes)
    tokens = header.values.get("adapter.alora.invocation_tokens")
    if not tokens:
        return adapter
    values = {**laid_out(adapter, base)[0].to_dict(), _INVOCATION: list(tokens)}
    return replace(adapter, config=values, metadata=metadata)


def _texts(adapter: CanonicalAdapter) -> dict[str, str]:
    """Return the texts to write beside an adapter's tensors: what it says of its base, and what is Veneer's own."""
    texts = {f"{_OWN}{key}": text for key, text in adapter.metadata.items() if key != original_config.KEY}
    texts |= original_config.metadata_of(adapter)
    if adapter.base:
        texts[_BASE_NAME] = adapter.base.rstrip("/").rpartition("/")[2]
    if adapter.base and looks_like_hub_id(adapter.base):
        texts[_BASE_URL] = _HUB + adapter.base
    return texts


def _of_one_model(adapters: Mapping[str, CanonicalAdapter], base: Base | None) -> tuple[CanonicalAdapter, Base]:
    """Return the one adapter, and the base, which has to be there."""
    if list(adapters) != [""]:
        raise UnsupportedError(
            f"A GGUF file holds the adapter of one language model, and this one has parts: {', '.join(adapters)}.",
            hint="Name the part with --component.",
        )
    if base is None:
        raise _base_needed()
    return adapters[""], base


def _weights_of(adapter: CanonicalAdapter, base: Base) -> dict[str, list[Weight]]:
    """Return the weights of a GGUF file that each module's change goes into.

    Raises:
        UnsupportedError: a module has no weight there to which llama.cpp adds a LoRA. BindError: it does not fit.
    """
    check_fit(adapter.modules.values(), base, "The adapter")
    by_parameter: dict[str, list[Weight]] = {}
    for weight in weights_of(base):
        by_parameter.setdefault(weight.parameter, []).append(weight)
    weights = {}
    for path, change in adapter.modules.items():
        parameter = path if change.is_parameter else f"{path}.weight"
        weights[path] = by_parameter.get(parameter, [])
        _check_held(path, weights[path], base)
        _check_turned(change, weights[path][0])
    return weights


def _check_held(path: str, weights: Sequence[Weight], base: Base) -> None:
    """Refuse a module whose change llama.cpp does not compute."""
    architecture = architecture_of(base)
    if not weights:
        raise UnsupportedError(
            f"{path} is no weight to which llama.cpp adds a LoRA (architecture {architecture.name}).", hint=_MERGE
        )
    is_tied = architecture.one_table or weights[0].parameter in {*base.tied, *base.tied.values()}
    if weights[0].name in (EMBEDDING, HEAD) and is_tied:
        raise UnsupportedError(
            f"{path}: the embedding and the output head of {base.origin} are one weight in a GGUF file, where "
            "llama.cpp would take the LoRA for both.",
            hint=_MERGE,
        )


def _check_turned(change: ModuleChange, weight: Weight) -> None:
    """Refuse experts whose factors are for ``(in, out)``, as earlier versions of peft wrote them."""
    if len(weight.shape) == 3 and change.leaves["lora_A.weight"].shape[1] != weight.shape[2]:
        raise BindError(
            f"{change.path}: its factors are for weights with rows and columns exchanged.",
            hint="Load and save the adapter with the peft that wrote it and its newest version.",
        )
