"""Reads and writes PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors`` in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.configs.base import PeftConfig, is_of_mlx
from veneer.files.names import ADAPTER_CONFIG, ADAPTER_STEM, ADAPTER_WEIGHTS, INDEX
from veneer.files.source import PICKLES, Source
from veneer.files.weight_files import read_checked_headers
from veneer.formats import original_config
from veneer.formats.base_facts import named_base
from veneer.formats.canonical import CanonicalAdapter
from veneer.formats.components import COMPONENTS, model_of
from veneer.formats.format import Base, ReadOptions, Step
from veneer.formats.tensor_files import new_folder, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHTS = (ADAPTER_WEIGHTS, ADAPTER_STEM + INDEX, *PICKLES[ADAPTER_STEM])


class PeftFormat:
    """Reads and writes PEFT's format."""

    name: ClassVar[str] = "peft"
    title: ClassVar[str] = "PEFT"
    reads: ClassVar[bool] = True
    writes: ClassVar[bool] = True

    def recognise(self, source: Source) -> bool:
        """Tell whether there are PEFT's config and weights, or those of components of a pipeline below."""
        if _components(source):
            return True
        if source.file is not None and source.file.name != ADAPTER_WEIGHTS:
            return False
        if not source.has(ADAPTER_CONFIG) or not any(source.has(name) for name in _WEIGHTS):
            return False
        values = source.json(ADAPTER_CONFIG)
        return values.get("peft_type") is not None and not is_of_mlx(values)

    def read(self, source: Source, options: ReadOptions) -> Mapping[str, CanonicalAdapter]:
        """Read a folder, or those of a pipeline's components below it."""
        components = _components(source)
        if options.component in components:
            return {options.component: self._read(components[options.component], options)}
        if components:
            return {name: self._read(folder, replace(options, component=name)) for name, folder in components.items()}
        return {"": self._read(source, options)}

    def _read(self, source: Source, options: ReadOptions) -> CanonicalAdapter:
        from veneer.formats.expert_layouts import in_layout_of_now
        from veneer.formats.peft_layout import canonical

        values = source.json(ADAPTER_CONFIG)
        config = PeftConfig.from_dict(values, where=f"{source.origin}/{ADAPTER_CONFIG}")
        headers = read_checked_headers(source, ADAPTER_STEM)
        tensors = {key: tensor for header in headers for key, tensor in read_tensors(header).items()}
        metadata = {key: value for header in headers for key, value in header.metadata.items()}
        base = options.base or named_base(config.base_model_name_or_path, source)
        base = model_of(base, options.component or "")
        adapter = canonical(config, tensors, metadata, base, source.origin)
        return in_layout_of_now(adapter, values, base, options.experts, source.origin)

    def write(self, adapters: Mapping[str, CanonicalAdapter], target: Path, base: Base | None) -> list[Step]:
        """Write a folder; where there are several components of a pipeline, one for each below it."""
        from veneer.formats.peft_layout import laid_out
        from veneer.formats.scaling import fitted

        fits = {component: fitted(adapter, self.name, self.title) for component, adapter in adapters.items()}
        with new_folder(target) as folder:
            for component, fit in fits.items():
                config, tensors = laid_out(fit.adapter, model_of(base, component))
                metadata = {key: value for key, value in fit.adapter.metadata.items() if key != original_config.KEY}
                place = folder / component if len(fits) > 1 else folder
                write_folder(place, config.to_json(inference_mode=True), tensors, metadata)
        return [step for fit in fits.values() for step in fit.steps]


def _components(source: Source) -> dict[str, Source]:
    """Return the folders of a pipeline's components below a source that has no config itself."""
    if source.file is not None or source.has(ADAPTER_CONFIG):
        return {}
    folders = {name: source.root / name for name in COMPONENTS if (source.root / name / ADAPTER_CONFIG).is_file()}
    return {name: Source(folder, f"{source.origin}/{name}") for name, folder in folders.items()}


def write_folder(folder: Path, config: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write an adapter's config and tensors into a folder."""
    folder.mkdir(exist_ok=True)
    write_tensors(folder / ADAPTER_WEIGHTS, tensors, metadata)
    (folder / ADAPTER_CONFIG).write_text(config, encoding="utf-8")
