"""Reads adapters in torchtune's own layout.

adapter_model.pt: layers.<n>.attn.q_proj.lora_a.weight [r, in], .lora_b.weight [out, r], .magnitude [out] of DoRA

torchtune rotates the two values of a pair that lie beside each other, where transformers has them half a head apart:
rows of q and k are in another order, but for the kinds of models that it builds with transformers' order. The folder
that torchtune writes for PEFT beside it is read as PEFT's.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BindError, IncompleteCheckpointError, UnsupportedError
from veneer.files.json_file import is_number
from veneer.files.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from veneer.files.source import Source
from veneer.formats.base_facts import named_base
from veneer.formats.canonical import CanonicalAdapter, ModuleChange
from veneer.formats.format import Base, ReadOptions, Step
from veneer.formats.tensor_files import header_of, read_tensors
from veneer.formats.trainer_names import adapter_of, fused, heads_of, lora, model_type, needed, with_rows

if TYPE_CHECKING:
    from torch import Tensor

_PICKLE = "adapter_model.pt"
_KEY = re.compile(
    r"(?P<module>layers\.\d+\.(?:attn|mlp)\.\w+|output)\.(?P<leaf>lora_a\.weight|lora_b\.weight|magnitude)"
)
# As they stand in a pickle's bytes.
_MARKS = (b".lora_a.weight", b"layers.")
_LEAVES = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_NAMES: Mapping[str, str] = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
# Model type -> True where the rows of q and k are in torchtune's order.
_REORDERED: Mapping[str, bool] = {
    **dict.fromkeys(("gemma", "gemma2", "llama", "mistral"), True),
    **dict.fromkeys(("phi3", "qwen2"), False),
}


class TorchtuneFormat:
    """An adapter of torchtune."""

    name: ClassVar[str] = "torchtune"
    title: ClassVar[str] = "torchtune"
    reads: ClassVar[bool] = True
    writes: ClassVar[bool] = False

    def recognise(self, source: Source) -> bool:
        """Tell whether all tensors have torchtune's names, or a pickle has its names in it."""
        header = header_of(source, ADAPTER_WEIGHTS)
        if header is not None:
            return bool(header.tensors) and all(map(_KEY.fullmatch, header.tensors))
        return source.file is None and source.has(_PICKLE) and _names_layers(source.path(_PICKLE))

    def read(self, source: Source, options: ReadOptions) -> Mapping[str, CanonicalAdapter]:
        """Read a folder, or the safetensors file that a pickle was converted to."""
        config = source.json(ADAPTER_CONFIG) if source.has(ADAPTER_CONFIG) else {}
        name = config.get("base_model_name_or_path")
        name = name if isinstance(name, str) and name else None
        base = needed(options.base or named_base(name, source), source.origin, self.title)
        alpha = _alpha(config, source.origin)
        changes = _changes(_tensors(source), alpha, source.origin)
        return {"": adapter_of(_in_order(changes, base), base, source.origin, name)}

    def write(self, adapters: Mapping[str, CanonicalAdapter], target: Path, base: Base | None) -> list[Step]:
        """Refuse to write: torchtune resumes only its own training."""
        raise UnsupportedError("torchtune's layout is only read.", hint="Write PEFT's: --to peft")


def _names_layers(path: Path) -> bool:
    """Tell whether a pickle has torchtune's names in it, by its bytes: nothing in it is run."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            text = archive.read(names[0]) if names else b""
    except (OSError, zipfile.BadZipFile):
        return False
    return b"base_model.model." not in text and all(mark in text for mark in _MARKS)


def _tensors(source: Source) -> Mapping[str, Tensor]:
    from veneer.files.convert_pickle import read_pickle

    header = header_of(source, ADAPTER_WEIGHTS)
    return read_pickle(source.path(_PICKLE)) if header is None else read_tensors(header)


def _alpha(config: Mapping[str, Any], origin: str) -> float:
    alpha = config.get("lora_alpha")
    if not is_number(alpha):
        raise IncompleteCheckpointError(
            f"{origin}: torchtune's file does not say its alpha, and no {ADAPTER_CONFIG} beside it has a lora_alpha.",
            hint=f'Write {{"lora_alpha": 16}} into {ADAPTER_CONFIG} there, with the value of the recipe.',
        )
    return float(alpha)


def _changes(tensors: Mapping[str, Tensor], alpha: float, origin: str) -> dict[str, ModuleChange]:
    """Return torchtune's module -> its change, in torchtune's order of rows."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise BindError(
                f"{origin}: {key} is no tensor of a LoRA of torchtune.",
                hint="Models of images and text, and classifiers, are merged with torchtune.",
            )
        modules.setdefault(match["module"], {})[_LEAVES[match["leaf"]]] = tensor
    absent: dict[str, Tensor | None] = {"lora_A.weight": None, "lora_B.weight": None}
    return {module: lora(module, {**absent, **leaves}, alpha, origin) for module, leaves in modules.items()}


def _in_order(changes: Mapping[str, ModuleChange], base: Base) -> list[ModuleChange]:
    """Return the changes under the base's names, with rows in transformers' order."""
    kind = model_type(base, list(_REORDERED), TorchtuneFormat.title)
    layers: dict[str, dict[str, ModuleChange]] = {}
    for module, change in changes.items():
        head, _, inner = module.partition(".attn.") if ".attn." in module else module.partition(".mlp.")
        part = module.removeprefix(f"{head}.") if inner else module
        layers.setdefault(head, {})[part] = _reordered(part, change, base) if _REORDERED[kind] else change
    moved: list[ModuleChange] = []
    for head, parts in layers.items():
        if head == "output":
            moved.append(replace(parts["output"], path="lm_head"))
        else:
            moved += _phi3_layer(f"model.{head}", parts, base) if kind == "phi3" else _layer(f"model.{head}", parts)
    return moved


def _layer(path: str, parts: Mapping[str, ModuleChange]) -> list[ModuleChange]:
    return [replace(change, path=f"{path}.{_NAMES.get(part, part)}") for part, change in parts.items()]


def _phi3_layer(path: str, parts: Mapping[str, ModuleChange], base: Base) -> list[ModuleChange]:
    """Return the changes of a layer whose projections transformers has in two."""
    wide = base.shapes[f"{path}.mlp.down_proj.weight"][1]
    groups = (
        ("self_attn.qkv_proj", ("attn.q_proj", "attn.k_proj", "attn.v_proj"), heads_of(base).rows),
        ("mlp.gate_up_proj", ("mlp.w1", "mlp.w3"), (wide, wide)),
    )
    joined = [
        fused(f"{path}.{name}", parts, names, rows) for name, names, rows in groups if any(n in parts for n in names)
    ]
    alone = {part: change for part, change in parts.items() if not any(part in names for _, names, _ in groups)}
    return [*joined, *_layer(path, alone)]


def _reordered(part: str, change: ModuleChange, base: Base) -> ModuleChange:
    """Return the change of q or k with the values of a pair half a head apart; any other as it is."""
    if part not in ("attn.q_proj", "attn.k_proj"):
        return change
    import torch

    heads = heads_of(base)
    count = heads.query if part == "attn.q_proj" else heads.key
    size = change.leaves["lora_B.weight"].shape[0]
    if size != count * heads.size:
        raise BindError(
            f"{part} has {size} rows, and {base.origin} {count} heads of {heads.size}.",
            hint="Give the base that the adapter was trained on: --base",
        )
    rows = torch.arange(size).view(count, heads.size // 2, 2).transpose(1, 2).reshape(-1)
    return with_rows(change, rows)
