"""Translates a checkpoint's keys to slots in a model and back.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight      in a checkpoint
                     model.layers.0.self_attn.q_proj                    the slot's module
                                                     lora_A.weight      the slot's leaf
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight   in memory, adapter "default"

Keys are taken apart by structure, from the end: a module whose own name contains "lora" or "weight" is safe.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PREFIX = "base_model.model."
# Tensors that all layers of an adapter share belong to no module. Beside a prompt it begins modules saved whole.
SHARED_PREFIX = "base_model."


@dataclass(frozen=True)
class Slot:
    """A place for one tensor: a module, as the base model names it, and a leaf of the method or a parameter."""

    module: str
    leaf: str


def decode(key: str, leaves: Iterable[str], prefix: str = PREFIX) -> Slot | None:
    """Return the slot of a checkpoint's ``key``, or ``None`` when it is not in this dialect.

    A key that ends in none of the method's ``leaves`` is a parameter of a module that was saved whole.
    """
    if not key.startswith(prefix):
        return None
    name = key[len(prefix) :]
    for leaf in leaves:
        if name.endswith("." + leaf):
            return Slot(name[: -len(leaf) - 1], leaf)
    module, _, parameter = name.rpartition(".")
    return Slot(module, parameter)


def encode(module: str, leaf: str, prefix: str = PREFIX) -> str:
    """Return the checkpoint key of a slot; the inverse of :func:`decode`."""
    return f"{prefix}{module}.{leaf}"
