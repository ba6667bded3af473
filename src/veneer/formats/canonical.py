"""Defines the canonical form of an adapter, which each format is read into and written from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModuleChange:
    """The change of one module of the base: its factors as PEFT lays them out, and their scale.

    Attributes:
        path: the module, as the base names it: ``model.layers.0.self_attn.q_proj``. Of a parameter that is no module of
            its own (a stack of experts), its path: ``model.layers.0.mlp.experts.gate_up_proj``.
        method: the ``peft_type`` whose leaves these are: ``LORA``, ``LOHA``, ``LOKR``, ``IA3``.
        leaves: leaf -> tensor, by PEFT's names and shapes: ``lora_A.weight`` ``[rank, in]``, ``lora_B.weight``
            ``[out, rank]`` (of a convolution ``[rank, in, h, w]`` and ``[out, rank, 1, 1]``), ``lora_embedding_A``
            ``[rank, vocabulary]``, ``lora_embedding_B`` ``[dim, rank]``, ``lora_magnitude_vector`` ``[out]``.
        rank: the rank; 0 for a method without one.
        scale: what the product of the factors is multiplied by: ``alpha / rank``, or ``alpha / sqrt(rank)``.
        is_parameter: True for a parameter that is no module of its own.
    """

    path: str
    method: str
    leaves: Mapping[str, Tensor]
    rank: int
    scale: float
    is_parameter: bool = False


@dataclass(frozen=True)
class CanonicalAdapter:
    """An adapter in no tool's form: its changes by module, and what came with them.

    Attributes:
        modules: path -> change, in the file's order.
        whole: key -> tensor of what an adapter brings whole, by PEFT's keys without their prefix: trained biases,
            modules to save, trained rows.
        base: the base's path or hub id, where the file names it.
        config: PEFT's config as JSON values, where the adapter has one or one travelled along; it is the config of
            exactly these changes only where the tensors are as they were.
        metadata: strings that came with the tensors.
        notes: what was decided while it was read, for the report.
    """

    modules: Mapping[str, ModuleChange]
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    base: str | None = None
    config: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
