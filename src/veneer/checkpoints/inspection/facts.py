"""Holds the facts and problems that an inspection finds, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from veneer.printing import AsJson

# The format of PEFT's own adapters.
PEFT = "PEFT"


@dataclass(frozen=True)
class Problem:
    """Describes a reason why a checkpoint will not load, or will not do what it says."""

    code: str
    message: str
    hint: str


@dataclass(frozen=True)
class Weights:
    """Counts the tensors of a checkpoint.

    Attributes:
        files: the files that hold them.
        tensors: their number.
        parameters: the number of values in all of them.
        nbytes: their bytes.
        dtypes: dtype -> values of it.
    """

    files: list[str]
    tensors: int
    parameters: int
    nbytes: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class AdapterFacts:
    """Holds the facts of an adapter's folder.

    Attributes:
        peft_type: its method.
        base: the base model that its config names.
        base_revision: that base's revision.
        base_digest: the digest of the base that it was trained on, where it is recorded.
        task: its task.
        ranks: rank -> number of layers that have it.
        alpha: the config's ``lora_alpha``.
        options: the method's options that are on, such as ``use_rslora``.
        target_modules: as in the config.
        modules_to_save: modules that it brings whole.
        layers: the number of layers that it adapts; for SHADOW, of blocks.
        weights: its tensors; ``None`` when they cannot be read.
        virtual_tokens: the number of tokens that a prompt puts before the input or into the cache.
        format: the tool whose format it is in, such as "MLX-LM"; "PEFT" for PEFT's own.
    """

    peft_type: str | None
    base: str | None
    base_revision: str | None
    base_digest: str | None
    task: str | None
    ranks: dict[int, int]
    alpha: float | None
    options: dict[str, Any]
    target_modules: list[str] | str | None
    modules_to_save: list[str] | None
    layers: int
    weights: Weights | None
    virtual_tokens: int | None = None
    format: str = PEFT


@dataclass(frozen=True)
class ModelFacts:
    """Holds the facts of a full model's folder.

    Attributes:
        architecture: its class.
        model_type: its family.
        dtype: as its config says.
        quantization: its quantisation config; ``None`` when it is not quantised.
        tied_embeddings: its config ties input and output embeddings.
        weights: its tensors; ``None`` when they cannot be read.
    """

    architecture: str | None
    model_type: str | None
    dtype: str | None
    quantization: dict[str, Any] | None
    tied_embeddings: bool | None
    weights: Weights | None


@dataclass(frozen=True)
class PathFacts(AsJson):
    """Holds the facts of a path.

    Attributes:
        path: the path that was asked for.
        kind: ``"model"``, ``"adapter"``, ``"model+adapter"`` or ``"unknown"``. A set of adapters in subfolders is
            an ``"adapter"``.
        adapter: the adapter at the root of the folder.
        model: the full model at the root of the folder.
        adapters: the adapters of a set: name -> the same for each.
        commit: the hub commit.
        problems: the faults that were found.
        memory: the bytes of all weights that loading it needs, as they are on disk; ``None`` where the base is not on
            this machine, or there are problems.
        next_command: the command that runs it; ``None`` where it writes no text, or there are problems.
    """

    path: str
    kind: str
    adapter: AdapterFacts | None = None
    model: ModelFacts | None = None
    adapters: Mapping[str, PathFacts] = field(default_factory=dict)
    commit: str | None = None
    problems: tuple[Problem, ...] = ()
    memory: int | None = None
    next_command: str | None = None
