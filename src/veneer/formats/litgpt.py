"""Reads adapters of LitGPT.

lit_model.pth.lora: transformer.h.<n>.attn.qkv.lora_A [r * k, in], .lora_B [rows of the k, r], the k of q, k and v that
are adapted, in this order; other layers have lora_A [r, in] and lora_B [out, r]
hyperparameters.yaml: lora_r, lora_alpha, and lora_query, lora_key, lora_value, which say the k
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BindError, CorruptFileError, IncompleteCheckpointError, UnsupportedError
from veneer.files.json_file import is_number
from veneer.files.names import LITGPT_WEIGHTS, MODEL_CONFIG
from veneer.files.source import Source
from veneer.formats.base_facts import base_on_disk, named_base
from veneer.formats.canonical import CanonicalAdapter, ModuleChange
from veneer.formats.format import Base, ReadOptions, Step
from veneer.formats.trainer_names import adapter_of, fused, heads_of, lora, model_type, needed, with_rows

if TYPE_CHECKING:
    from torch import Tensor

_SETTINGS = "hyperparameters.yaml"
_KEY = re.compile(r"(?P<module>.+)\.(?P<leaf>lora_[AB])")
_LAYER = re.compile(r"transformer\.h\.(?P<index>\d+)\.(?P<part>.+)")
_QKV = "attn.qkv"
_PARTS = ("query", "key", "value")
_LLAMA: Mapping[str, str] = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
# Model type -> part of LitGPT's layer -> module of transformers' layer.
_NAMES: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "qwen2", "qwen3"), _LLAMA),
    "phi": {
        **{"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"},
        **{"attn.proj": "self_attn.dense", "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"},
    },
    "phi3": {_QKV: "self_attn.qkv_proj", "attn.proj": "self_attn.o_proj", "mlp.proj": "mlp.down_proj"},
    "gpt_neox": {
        **{_QKV: "attention.query_key_value", "attn.proj": "attention.dense"},
        **{"mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"},
    },
}
_HALVES = ("mlp.fc_1", "mlp.fc_2")


class LitgptFormat:
    """An adapter of LitGPT."""

    name: ClassVar[str] = "litgpt"
    title: ClassVar[str] = "LitGPT"
    reads: ClassVar[bool] = True
    writes: ClassVar[bool] = False

    def recognise(self, source: Source) -> bool:
        """Tell by the file's name."""
        return source.has(LITGPT_WEIGHTS) if source.file is None else source.file.name == LITGPT_WEIGHTS

    def read(self, source: Source, options: ReadOptions) -> Mapping[str, CanonicalAdapter]:
        """Read the pickle as plain tensors: nothing in it is run."""
        from veneer.files.convert_pickle import read_pickle

        settings = _settings(source)
        name = _base_name(settings)
        base = needed(options.base or named_base(name, source) or _beside(source), source.origin, self.title)
        tensors = read_pickle(source.path(LITGPT_WEIGHTS), "model")
        return {"": adapter_of(_changes(tensors, settings, base, source.origin), base, source.origin, name)}

    def write(self, adapters: Mapping[str, CanonicalAdapter], target: Path, base: Base | None) -> list[Step]:
        """Refuse to write: LitGPT loads only its own training."""
        raise UnsupportedError("LitGPT's layout is only read.", hint="Write PEFT's: --to peft")


def _beside(source: Source) -> Base | None:
    """Return the facts of the base whose config LitGPT has copied beside the adapter."""
    return base_on_disk(Source(source.root, source.origin)) if (source.root / MODEL_CONFIG).is_file() else None


def _settings(source: Source) -> dict[str, Any]:
    """Read the training's settings."""
    import yaml  # type: ignore[import-untyped]

    if not source.has(_SETTINGS):
        raise IncompleteCheckpointError(
            f"{source.origin}: there is no {_SETTINGS} beside the weights, which says their rank and alpha.",
            hint="Copy it from where the adapter was trained.",
        )
    try:
        values = yaml.safe_load(source.path(_SETTINGS).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CorruptFileError(f"{source.origin}/{_SETTINGS} is no YAML.", hint="Copy it again.") from error
    values = values if isinstance(values, dict) else {}
    if type(values.get("lora_r")) is not int or values["lora_r"] < 1 or not is_number(values.get("lora_alpha")):
        raise CorruptFileError(
            f"{source.origin}/{_SETTINGS} has lora_r {values.get('lora_r')!r} and lora_alpha "
            f"{values.get('lora_alpha')!r}.",
            hint="Both are numbers where LitGPT wrote it; copy it again.",
        )
    return values


def _base_name(settings: Mapping[str, Any]) -> str | None:
    """Return the hub id of the base, by which LitGPT calls its folder: ``checkpoints/owner/name``."""
    folder = settings.get("checkpoint_dir")
    parts = Path(folder).parts if isinstance(folder, str) else ()
    return "/".join(parts[-2:]) if len(parts) > 2 and parts[-3] == "checkpoints" else None


def _changes(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], base: Base, origin: str) -> list[ModuleChange]:
    """Return the changes under the base's names."""
    kind = model_type(base, list(_NAMES), LitgptFormat.title)
    layers: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        layer = _LAYER.fullmatch(match["module"]) if match else None
        if match is None or (layer is None and match["module"] != "lm_head"):
            raise BindError(
                f"{origin}: {key} is no tensor of a LoRA of LitGPT.",
                hint="Merge the adapter with litgpt merge_lora, and extract it anew with veneer extract.",
            )
        index, part = (layer["index"], layer["part"]) if layer else ("", "lm_head")
        layers.setdefault(index, {}).setdefault(part, {})[f"{match['leaf']}.weight"] = tensor
    changes: list[ModuleChange] = []
    for index, parts in layers.items():
        if not index:
            changes.append(_head(parts["lm_head"], settings, base, origin))
        else:
            prefix = f"{'gpt_neox' if kind == 'gpt_neox' else 'model'}.layers.{index}"
            changes += _layer(prefix, _by_part(parts, settings, base, origin), _NAMES[kind], base)
    return changes


def _head(leaves: Mapping[str, Tensor], settings: Mapping[str, Any], base: Base, origin: str) -> ModuleChange:
    """Return the change of the output layer, without the rows that LitGPT adds to the vocabulary."""
    change = _lora("lm_head", leaves, settings, origin)
    rows = base.shapes.get("lm_head.weight", (change.leaves["lora_B.weight"].shape[0],))[0]
    return replace(change, leaves={**change.leaves, "lora_B.weight": change.leaves["lora_B.weight"][:rows]})


def _lora(path: str, leaves: Mapping[str, Tensor], settings: Mapping[str, Any], origin: str) -> ModuleChange:
    absent: dict[str, Tensor | None] = {"lora_A.weight": None, "lora_B.weight": None}
    return lora(path, {**absent, **leaves}, float(settings["lora_alpha"]), origin)


def _by_part(
    parts: Mapping[str, Mapping[str, Tensor]], settings: Mapping[str, Any], base: Base, origin: str
) -> dict[str, ModuleChange]:
    """Return the changes of a layer by part, the projection to queries, keys and values taken apart."""
    changes: dict[str, ModuleChange] = {}
    for part, leaves in parts.items():
        if part == _QKV:
            changes.update(_taken_apart(leaves, settings, base, origin))
        else:
            changes[part] = _lora(part, leaves, settings, origin)
    return changes


def _taken_apart(
    leaves: Mapping[str, Tensor], settings: Mapping[str, Any], base: Base, origin: str
) -> dict[str, ModuleChange]:
    enabled = [name for name in _PARTS if settings.get(f"lora_{name}")]
    rows = [size for name, size in zip(_PARTS, heads_of(base).rows, strict=True) if name in enabled]
    rank, down, up = settings["lora_r"], leaves.get("lora_A.weight"), leaves.get("lora_B.weight")
    if down is None or up is None or (down.shape[0], *up.shape) != (rank * len(enabled), sum(rows), rank):
        shapes = [None if tensor is None else list(tensor.shape) for tensor in (down, up)]
        raise BindError(
            f"{origin}: attn.qkv has lora_A {shapes[0]} and lora_B {shapes[1]}, and {_SETTINGS} and {base.origin} say "
            f"rank {rank} for {', '.join(enabled) or 'nothing'} of {rows} rows.",
            hint="Give the base that the adapter was trained on: --base",
        )
    pairs = zip(enabled, down.split(rank), up.split(rows), strict=True)
    return {name: _lora(name, {"lora_A.weight": a, "lora_B.weight": b}, settings, origin) for name, a, b in pairs}


def _layer(path: str, parts: Mapping[str, ModuleChange], names: Mapping[str, str], base: Base) -> list[ModuleChange]:
    """Return the changes of a layer under the base's names; what the base has in one layer is joined."""
    alone = dict(parts)
    changes = []
    if _QKV in names and any(name in alone for name in _PARTS):
        projection = fused(f"{path}.{names[_QKV]}", alone, _PARTS, heads_of(base).rows)
        changes.append(_by_head(projection, base) if path.startswith("gpt_neox") else projection)
        alone = {part: change for part, change in alone.items() if part not in _PARTS}
    if not names.keys() & set(_HALVES) and any(name in alone for name in _HALVES):
        wide = base.shapes[f"{path}.mlp.down_proj.weight"][1]
        changes.append(fused(f"{path}.mlp.gate_up_proj", alone, _HALVES, (wide, wide)))
        alone = {part: change for part, change in alone.items() if part not in _HALVES}
    return [*changes, *(replace(change, path=f"{path}.{names.get(part, part)}") for part, change in alone.items())]


def _by_head(change: ModuleChange, base: Base) -> ModuleChange:
    """Return a change whose rows are those of each head's query, key and value, one head after the other."""
    import torch

    heads = heads_of(base)
    rows = torch.arange(3 * heads.query * heads.size).view(3, heads.query, heads.size).transpose(0, 1).reshape(-1)
    return with_rows(change, rows)
