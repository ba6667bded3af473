"""Builds a base's skeleton from its headers and config alone, for the families that have exactly one form.

Every other base is built by transformers: one of another family, method or task, with a tensor too many, or with a
shape that the config does not say.
"""

# 3.7 s of imports of transformers' model classes are saved: benchmarks/notes.md, The merge from disk to disk.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from veneer.base_model.plain_families import EMBEDDING, FAMILIES, HEAD, Family, is_tied, plain_shapes
from veneer.checkpoints.checkpoint import Checkpoint
from veneer.configs.base import PeftConfig
from veneer.configs.methods.lora import LoraConfig
from veneer.configs.names import TaskType
from veneer.files.names import MODEL_CONFIG
from veneer.files.source import Source
from veneer.files.torch_dtypes import DTYPES
from veneer.merging.base.skeleton import StoredNames
from veneer.merging.base.weight_files import WeightFiles


class _Config(SimpleNamespace):
    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class _Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Leave the weight unfilled: on the meta device filling it would import torch's compiler."""


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Leave the weight unfilled, as above."""


class _Norm(nn.Module):
    """A norm's weight, shape ``(size,)``; nothing else of it matters here."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)


class _Plain(nn.Module):
    config: _Config

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule("model.embed_tokens")

    def get_output_embeddings(self) -> nn.Module:
        return self.get_submodule("lm_head")


def plain_skeleton(
    source: Source, files: WeightFiles, checkpoints: Sequence[Checkpoint], task: str | None, **changes: Any
) -> nn.Module | None:
    """Build the model of a base on the meta device; ``None`` where it is not plain.

    Args:
        source: the base.
        files: its weight files.
        checkpoints: the adapters.
        task: what the model is for.
        **changes: keys of the config to set.
    """
    config = {**source.json(MODEL_CONFIG), **changes}
    shapes = plain_shapes(config)
    if shapes is None or not _are_plain(checkpoints, task):
        return None
    stored = {name: place.info for name, place in files.places.items()}
    if any(info.dtype not in DTYPES for info in stored.values()):
        return None
    if is_tied(config):
        del shapes[HEAD]
    if shapes != {name: info.shape for name, info in stored.items()}:
        return None
    return _built(
        FAMILIES[config["model_type"]], config, {name: DTYPES[info.dtype] for name, info in stored.items()}, shapes
    )


def _are_plain(checkpoints: Sequence[Checkpoint], task: str | None) -> bool:
    """Tell whether a plain skeleton has all that adapters ask of the base."""
    tasks = {task, *(checkpoint.config.task_type for checkpoint in checkpoints)}
    return tasks <= {None, TaskType.CAUSAL_LM} and all(_is_lora(checkpoint.config) for checkpoint in checkpoints)


def _is_lora(config: PeftConfig) -> bool:
    """Tell whether an adapter adds factors alone; one that adds biases may need more of the config than is here."""
    return isinstance(config, LoraConfig) and not config.lora_bias


def plainly_stored(files: WeightFiles) -> StoredNames:
    """Return where a plain model's parameters lie: each under its own name."""
    return StoredNames({name: name for name in files.places}, {})


def _built(
    family: Family,
    config: Mapping[str, Any],
    dtypes: Mapping[str, torch.dtype],
    shapes: Mapping[str, tuple[int, ...]],
) -> nn.Module:
    model: _Plain = type(family.model_class, (_Plain,), {})()
    model.config = _Config(**config)
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight":
            _put(model, module, _module(module, shape, dtypes[name], f"{module}.bias" in shapes))
    if HEAD not in shapes:
        head = _module("lm_head", shapes[EMBEDDING], dtypes[EMBEDDING], False)
        head.weight = model.get_parameter(EMBEDDING)
        _put(model, "lm_head", head)
    return model.eval()


def _module(name: str, shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> nn.Module:
    if len(shape) == 1:
        return _Norm(shape[0], dtype)
    if name.endswith("embed_tokens"):
        return _Embedding(shape[0], shape[1], dtype=dtype, device="meta").requires_grad_(False)
    return _Linear(shape[1], shape[0], bias=bias, dtype=dtype, device="meta").requires_grad_(False)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at its dotted name, and make the modules above it."""
    parent = model
    for part in name.split(".")[:-1]:
        if part not in parent._modules:
            parent.add_module(part, nn.ModuleList() if part == "layers" else nn.Module())
        parent = parent._modules[part]  # type: ignore[assignment]
    parent.add_module(name.rpartition(".")[2], module)
