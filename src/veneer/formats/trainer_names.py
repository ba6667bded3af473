"""Tells where the layers of trainers that have models of their own lie in the model of transformers.

Such a trainer keeps apart what transformers has in one layer, or the other way round; the parts are joined by rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from veneer.errors import BaseModelError, BindError, UnsupportedError
from veneer.formats.canonical import CanonicalAdapter, ModuleChange
from veneer.formats.fit_to_base import check_fit
from veneer.formats.format import Base

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """The sizes of a base's attention.

    Attributes:
        query: the number of heads of queries.
        key: the number of heads of keys, and of values.
        size: the width of a head.
    """

    query: int
    key: int
    size: int

    @property
    def rows(self) -> tuple[int, int, int]:
        """The numbers of rows of the projections to queries, keys and values."""
        return self.query * self.size, self.key * self.size, self.key * self.size


def heads_of(base: Base) -> Heads:
    """Return the sizes of a base's attention, as its config has them."""
    config = text_config(base)
    query = int(config["num_attention_heads"])
    size = config.get("head_dim") or int(config["hidden_size"]) // query
    return Heads(query, int(config.get("num_key_value_heads") or query), int(size))


def text_config(base: Base) -> Mapping[str, Any]:
    """Return the config of a base's language model."""
    text = base.config.get("text_config")
    return text if isinstance(text, Mapping) else base.config


def needed(base: Base | None, origin: str, tool: str) -> Base:
    """Return the base.

    Raises:
        BaseModelError: there is none.
    """
    if base is None:
        raise BaseModelError(
            f"{origin}: {tool} names and orders layers otherwise than transformers, by the kind of model.",
            hint="Give the base: --base",
        )
    return base


def model_type(base: Base, known: Sequence[str], tool: str) -> str:
    """Return the kind of a base.

    Raises:
        UnsupportedError: it is not among those whose layout is known.
    """
    kind = str(base.config.get("model_type"))
    if kind not in known:
        raise UnsupportedError(
            f"{base.origin}: the layout that {tool} has for a model of type {kind!r} is not known here.",
            hint=f"Known: {', '.join(sorted(known))}. Or merge the adapter with {tool}, and extract it anew: "
            "veneer extract MERGED BASE --out ADAPTER",
        )
    return kind


def lora(path: str, leaves: Mapping[str, Tensor | None], alpha: float, origin: str) -> ModuleChange:
    """Return the change of one layer, its rank read off its factors.

    Args:
        path: the layer.
        leaves: PEFT's leaves; ``None`` for one that the file does not have.
        alpha: what the rank divides.
        origin: the adapter, for errors.

    Raises:
        BindError: a factor is missing, or they are of two ranks.
    """
    down, up = leaves["lora_A.weight"], leaves["lora_B.weight"]
    present = {leaf: tensor for leaf, tensor in leaves.items() if tensor is not None}
    if down is None or up is None:
        raise BindError(f"{origin}: {path} has no lora_{'A' if down is None else 'B'}.", hint="Copy the file again.")
    if down.ndim != 2 or up.ndim != 2 or not down.shape[0] or down.shape[0] != up.shape[1]:
        raise BindError(
            f"{origin}: {path} has factors {list(down.shape)} and {list(up.shape)}, which do not fit together.",
            hint="Copy the file again.",
        )
    return ModuleChange(path, "LORA", present, down.shape[0], alpha / down.shape[0])


def fused(path: str, parts: Mapping[str, ModuleChange], names: Sequence[str], rows: Sequence[int]) -> ModuleChange:
    """Return the change of a layer of transformers that is several in the trainer's model.

    Args:
        path: the layer.
        parts: name -> change of those parts that have one.
        names: the parts in the order of their rows.
        rows: their numbers of rows.
    """
    from veneer.formats.fused_layers import joined

    return joined(path, [parts.get(name) for name in names], rows)


def adapter_of(changes: Sequence[ModuleChange], base: Base, origin: str, name: str | None = None) -> CanonicalAdapter:
    """Return the adapter of these changes, after a check that they fit the base."""
    check_fit(changes, base, origin)
    return CanonicalAdapter({change.path: change for change in changes}, base=name)


def with_rows(change: ModuleChange, rows: Tensor) -> ModuleChange:
    """Return a change with its rows in another order, those of a magnitude too.

    Args:
        change: the change.
        rows: for each row, the one that comes there.
    """
    by_row = ("lora_B.weight", "lora_magnitude_vector")
    leaves = {leaf: tensor[rows] if leaf in by_row else tensor for leaf, tensor in change.leaves.items()}
    return replace(change, leaves=leaves)
