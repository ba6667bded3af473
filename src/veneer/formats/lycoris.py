"""LyCORIS' format: kohya's file, with the tensors of LoHa, LoKr, (IA)3 and DoRA too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from veneer.files.source import Source
from veneer.formats.canonical import CanonicalAdapter
from veneer.formats.components import TEXT_ENCODERS
from veneer.formats.format import Base, Step
from veneer.formats.kohya import KohyaFormat, network_keys
from veneer.formats.network_modules import NetworkModule, is_of_pipelines, own_modules
from veneer.printing import warn


class LycorisFormat(KohyaFormat):
    """LyCORIS' format. It is asked after kohya's, which is a part of it."""

    name: ClassVar[str] = "lycoris"
    title: ClassVar[str] = "LyCORIS"
    network: ClassVar[str] = "lycoris.kohya"

    def recognise(self, source: Source) -> bool:
        """Tell by the beginnings of the keys."""
        return bool(network_keys(source))

    def write(self, adapters: Mapping[str, CanonicalAdapter], target: Path, base: Base | None) -> list[Step]:
        """Write a file; a ``target`` that does not end in .safetensors is a folder for it."""
        steps = super().write(adapters, target, base)
        changes = [change for adapter in adapters.values() for change in adapter.modules.values()]
        if any("lora_magnitude_vector" in change.leaves for change in changes):
            warn(
                "LyCORIS reads this DoRA as PEFT does; ComfyUI and Forge divide by the norm of the base's weight, "
                "and paint something else. For them: --as-lora --rank 16 --to kohya."
            )
        return steps

    def names(self, component: str, models: Mapping[str, Base]) -> tuple[str, list[NetworkModule]]:
        """Return kohya's names, or those that LyCORIS itself gives the modules of any other model."""
        prefix, modules = super().names(component, models)
        base = models[component]
        is_other = component in TEXT_ENCODERS and len(models) == 1 and not is_of_pipelines(base)
        return ("lycoris_", own_modules(base)) if is_other or not modules else (prefix, modules)
