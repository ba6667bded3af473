"""Writes a PEFT folder that servers read rightly: one rank, one whole alpha, plain targets, keys of old readers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import UnsupportedError
from veneer.files.source import Source
from veneer.formats import original_config
from veneer.formats.canonical import CanonicalAdapter
from veneer.formats.fit_to_base import without_copies
from veneer.formats.format import Base, ReadOptions, Step
from veneer.formats.peft import write_folder
from veneer.formats.tensor_files import new_folder

if TYPE_CHECKING:
    from veneer.formats.scaling import Fitted

_FIXED: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "use_rslora": False,
}


class ServingFormat:
    """Writes PEFT's format as vLLM, SGLang, TGI and hosted services read it; reading it is PEFT's."""

    name: ClassVar[str] = "serving"
    title: ClassVar[str] = "a server of LoRA"
    reads: ClassVar[bool] = False
    writes: ClassVar[bool] = True

    def recognise(self, source: Source) -> bool:
        """Return False: the folder is one of PEFT's."""
        return False

    def read(self, source: Source, options: ReadOptions) -> Mapping[str, CanonicalAdapter]:
        """Refuse to read: the folder is one of PEFT's."""
        raise UnsupportedError(f"{source.origin} is read as PEFT's.", hint="Leave the format out.")

    def write(self, adapters: Mapping[str, CanonicalAdapter], target: Path, base: Base | None) -> list[Step]:
        """Write a folder of one adapter."""
        from veneer.formats.peft_layout import keyed
        from veneer.formats.scaling import fitted

        if len(adapters) > 1:
            raise UnsupportedError(
                f"A server takes one adapter, and there are {len(adapters)}: {', '.join(adapters)}.",
                hint="Choose one: --component NAME.",
            )
        adapter = next(iter(adapters.values()))
        adapter = adapter if base is None else without_copies(adapter, base)
        alpha = _whole_alpha(adapter)
        rank = max((change.rank for change in adapter.modules.values()), default=1)
        fit = fitted(adapter, self.name, self.title, alpha / rank)
        text = json.dumps(_config(fit, alpha), indent=2, sort_keys=True) + "\n"
        tensors = keyed(fit.adapter.modules.values(), {}, base)
        with new_folder(target) as folder:
            write_folder(folder, text, tensors, {**adapter.metadata, **original_config.metadata_of(adapter)})
        return fit.steps


def _whole_alpha(adapter: CanonicalAdapter) -> int:
    """Return the whole number that is the adapter's alpha at its largest rank, or near it."""
    from veneer.formats.peft_layout import whole_if_equal
    from veneer.formats.scaling import common

    changes = adapter.modules.values()
    rank = max((change.rank for change in changes), default=1)
    exact = whole_if_equal(common(change.scale for change in changes) * rank)
    configured = (adapter.config or {}).get("lora_alpha")
    return next((alpha for alpha in (exact, configured) if isinstance(alpha, int) and alpha > 0), max(round(exact), 1))


def _config(fit: Fitted, alpha: int) -> dict[str, Any]:
    config = fit.adapter.config or {}
    return {
        **_FIXED,
        "base_model_name_or_path": fit.adapter.base,
        "lora_alpha": alpha,
        "r": fit.rank,
        "target_modules": sorted({_ending(path) for path in fit.adapter.modules}),
        "task_type": config.get("task_type") or "CAUSAL_LM",
    }


def _ending(path: str) -> str:
    """Return the last word of a module's path, with the one before it where that is only an index: ``to_out.0``."""
    *before, last = path.split(".")
    return f"{before[-1]}.{last}" if last.isdigit() and before else last
