"""Finds the names that modules of an older version of transformers have in a model now."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from veneer.base_model.catalog import Catalog

# Words that a module's name may begin with in one version and not in another.
_MOVING = frozenset({"language_model", "model", "text_model", "vision_model", "vision_tower", "visual"})


def current_names(unknown: Iterable[str], taken: set[str], catalog: Catalog) -> dict[str, str]:
    """Return module in the checkpoint -> the one module of the model that it can be.

    Args:
        unknown: modules of the checkpoint that the model does not have.
        taken: all modules of the checkpoint.
        catalog: the model's modules.
    """
    endings: dict[str, list[str]] = defaultdict(list)
    for name in catalog.modules:
        endings[_last(name)].append(name)
    current: dict[str, str] = {}
    for name in unknown:
        published = catalog.renamed(name)
        new = published if published in catalog.modules else _with_another_beginning(name, endings.get(_last(name), []))
        if new is not None and new not in taken and new not in current.values():
            current[name] = new
    return current


def _with_another_beginning(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that differs from ``name`` only in leading words that are known to move.

    transformers publishes no rule for the names of a text model inside a vision-language model, nor for those that many
    vision-language models had in its version 4: its rules are for the weights on the hub.
    """
    fitting: dict[str, tuple[int, int]] = {}
    for new in candidates:
        tail = _common_tail(name, new)
        before, after = _beginning(name, tail), _beginning(new, tail)
        words = {*before, *after}
        # "model." alone tells a model with a head from one without, and not a version from another.
        if tail and words <= _MOVING and words != {"model"}:
            fitting[new] = (len(set(before) & set(after)), tail)
    best = max(fitting.values(), default=None)
    chosen = [new for new, rank in fitting.items() if rank == best]
    return chosen[0] if len(chosen) == 1 else None


def _common_tail(a: str, b: str) -> int:
    """Return how many words two names end in alike."""
    count = 0
    for left, right in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if left != right:
            break
        count += 1
    return count


def _beginning(name: str, tail: int) -> list[str]:
    return name.split(".")[:-tail] if tail else name.split(".")


def _last(name: str) -> str:
    return name.rpartition(".")[2]
