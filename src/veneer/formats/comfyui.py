"""ComfyUI's own names, and the file of a transformer that it reads rightly: without a scale outside of the factors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from veneer.errors import UnsupportedError
from veneer.files.source import Source
from veneer.formats.canonical import CanonicalAdapter
from veneer.formats.components import by_component
from veneer.formats.diffusers import in_component
from veneer.formats.format import Base, Step
from veneer.formats.kohya import FILE, KohyaFormat, file_in, network_keys, travelling
from veneer.formats.network_names import DOTTED
from veneer.formats.tensor_files import write_tensors

if TYPE_CHECKING:
    from torch import Tensor


class ComfyuiFormat(KohyaFormat):
    """Reads ComfyUI's own names, ``diffusion_model.``, and writes diffusers' with every scale 1.

    ComfyUI, and diffusers before 2025, read no config: a scale has to be in the factors.
    """

    name: ClassVar[str] = "comfyui"
    title: ClassVar[str] = "ComfyUI"

    def recognise(self, source: Source) -> bool:
        """Tell by the beginnings of the keys."""
        keys = network_keys(source)
        return bool(keys) and all(key.startswith(DOTTED) for key in keys)

    def write(self, adapters: Mapping[str, CanonicalAdapter], target: Path, base: Base | None) -> list[Step]:
        """Write a file; a ``target`` that does not end in .safetensors is a folder for it."""
        from veneer.formats.peft_layout import keyed
        from veneer.formats.scaling import fitted

        tensors: dict[str, Tensor] = {}
        metadata: dict[str, str] = {}
        steps: list[Step] = []
        for component, adapter in by_component(adapters, base).items():
            if component == "unet":
                raise UnsupportedError(
                    "ComfyUI does not know diffusers' names for all modules of a UNet.",
                    hint="Write kohya's, which it does: --to kohya --base BASE.",
                )
            fit = fitted(adapter, self.name, self.title, scale=1.0)
            tensors |= in_component(component, keyed(fit.adapter.modules.values(), {}, None))
            metadata |= travelling(component, adapter)
            steps += fit.steps
        write_tensors(file_in(target, FILE), tensors, metadata)
        return steps
