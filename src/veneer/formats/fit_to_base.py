"""Compares an adapter with the base's parameters: their names and shapes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from veneer.errors import BindError

if TYPE_CHECKING:
    from veneer.formats.canonical import CanonicalAdapter, ModuleChange
    from veneer.formats.format import Base

_COPY = ".base_layer.weight"
# Kinds of models whose linear layers store the weight as (in, out).
_TURNED = ("decision_transformer", "gpt2", "imagegpt", "openai-gpt")


def check_fit(changes: Iterable[ModuleChange], base: Base, origin: str) -> None:
    """Raise ``BindError`` where a base does not have what the changes of a LoRA are for, or in another shape.

    Args:
        changes: the changes, under the base's names.
        base: the base.
        origin: the adapter, for the error.
    """
    problems = [problem for change in changes if (problem := _problem(change, base))]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise BindError(
            f"{origin} does not fit {base.origin}: {problems[0]}{more}.",
            problems=problems,
            hint="Give the base that it was trained on: --base",
        )


def without_copies(adapter: CanonicalAdapter, base: Base) -> CanonicalAdapter:
    """Return an adapter without the copies of the base's own weights that PEFT saves beside a LoRA of an embedding.

    One of another shape stays: the vocabulary was resized, and the base on disk does not have its rows.
    """
    copies = {
        key
        for key, tensor in adapter.whole.items()
        if key.endswith(_COPY) and base.shapes.get(key.replace(_COPY, ".weight")) == tuple(tensor.shape)
    }
    whole = {key: tensor for key, tensor in adapter.whole.items() if key not in copies}
    return replace(adapter, whole=whole) if copies else adapter


def _problem(change: ModuleChange, base: Base) -> str | None:
    shape = base.shapes.get(change.path) if change.is_parameter else base.shapes.get(f"{change.path}.weight")
    if shape is None:
        return f"it has no {change.path}"
    out, inner = _shape(change)
    is_turned = len(shape) == 3 or base.config.get("model_type") in _TURNED
    if shape[-2:] == (out, inner) or (is_turned and shape[-2:] == (inner, out)):
        return None
    return f"{change.path} is {list(shape)}, and the change {[out, inner]}"


def _shape(change: ModuleChange) -> tuple[int, int]:
    """Return the rows and columns of a change."""
    leaves = change.leaves
    if "lora_embedding_A" in leaves:
        return leaves["lora_embedding_A"].shape[1], leaves["lora_embedding_B"].shape[0]
    return leaves["lora_B.weight"].shape[0], leaves["lora_A.weight"].shape[1]
