"""Checks that a model can be the base of a PeftModel, and that its weights are those of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from veneer.errors import BaseModelError, VeneerError
from veneer.files.base_digest import base_digest
from veneer.files.lookup_options import OFFLINE
from veneer.files.resolve import resolve
from veneer.peft_model.tuner import Tuner

# Set on the base model itself, so that copies and pickles of it tell too.
_CHANGED = "_veneer_weights_changed"


def check_base(model: Any) -> None:
    """Raise ``BaseModelError`` unless ``model`` is a torch module without a PeftModel around it."""
    if isinstance(model, (str, Path)):
        raise BaseModelError(
            f"The base model must be a model in memory here, not the path {str(model)!r}.",
            hint=f"Use veneer.load(adapter, base={str(model)!r}), which loads both.",
        )
    if not isinstance(model, nn.Module):
        raise BaseModelError(
            f"The base model must be a torch module, not {type(model).__name__}.",
            hint="Load it with transformers, or use veneer.load(adapter, base=...).",
        )
    if isinstance(model._modules.get("base_model"), Tuner):
        raise BaseModelError(
            "This is a PeftModel already; wrapping it again would stack its adapters.",
            hint="Use its load_adapter(...) or add_adapter(...), or wrap what its unload() returns.",
        )


def note_changed(base: nn.Module) -> None:
    """Note that a base's weights are no longer those of its files."""
    setattr(base, _CHANGED, True)


def digest_of(base: nn.Module) -> str | None:
    """Return the digest of a base's files; ``None`` when they are not on this machine or hold other weights."""
    origin = getattr(base, "name_or_path", None)
    if not origin or getattr(base, _CHANGED, False):
        return None
    try:
        digest: str = base_digest(resolve(origin, OFFLINE, what="base").root)
        return digest
    except VeneerError:
        return None
