"""The format of kohya's scripts, which A1111, Forge and ComfyUI read: one file, with an alpha for each module."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from veneer.errors import BaseModelError, BindError, UnsupportedError
from veneer.files.names import SAFETENSORS
from veneer.files.safetensors_header import Header
from veneer.files.source import Source
from veneer.formats import original_config
from veneer.formats.canonical import CanonicalAdapter, ModuleChange
from veneer.formats.components import by_component, models_of
from veneer.formats.format import Base, ReadOptions, Step
from veneer.formats.network_modules import NetworkModule, network_modules
from veneer.formats.network_names import DOTTED, PREFIXES, NetworkNames, Place, belongs_to, prefix_to_write
from veneer.formats.tensor_files import header_of, only_file, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from veneer.formats.network_leaves import FileModule

# The endings of the keys of a LoRA; a file with others is of LyCORIS.
_LORA_ENDINGS = (".alpha", "down.weight", "up.weight", "lora_A.weight", "lora_B.weight", "lora_mid.weight")
FILE = f"lora{SAFETENSORS}"


class KohyaFormat:
    """The format of kohya's scripts."""

    name: ClassVar[str] = "kohya"
    title: ClassVar[str] = "kohya"
    reads: ClassVar[bool] = True
    writes: ClassVar[bool] = True
    network: ClassVar[str] = "networks.lora"

    def recognise(self, source: Source) -> bool:
        """Tell by the keys: their beginnings, and that they are a LoRA's."""
        keys = network_keys(source)
        return bool(keys) and all(key.endswith(_LORA_ENDINGS) for key in keys)

    def read(self, source: Source, options: ReadOptions) -> Mapping[str, CanonicalAdapter]:
        """Read a file: component -> adapter."""
        from veneer.formats.network_leaves import by_module, check_methods

        header = network_header(source)
        if header is None:
            raise BindError(f"{source.origin} holds no such file.", hint="Give the .safetensors file itself.")
        if options.base is None:
            raise BaseModelError(
                f"{source.origin}: only the base tells which module is meant by {next(iter(header.tensors))}.",
                hint="Name it: --base BASE, the folder of the pipeline or of its UNet or transformer.",
            )
        models = models_of(options.base, options.component)
        modules = by_module(read_tensors(header), source.origin)
        modules = _of_component(modules, options.component, models, source.origin)
        check_methods(modules, source.origin)
        places = NetworkNames(models).find([module.name for module in modules], source.origin)
        return {
            component: _adapter(component, modules, places, header, source.origin)
            for component in dict.fromkeys(place.component for place in places.values())
        }

    def write(self, adapters: Mapping[str, CanonicalAdapter], target: Path, base: Base | None) -> list[Step]:
        """Write a file; a ``target`` that does not end in .safetensors is a folder for it."""
        from veneer.formats.scaling import fitted

        if base is None:
            raise BaseModelError(
                f"{self.title} names modules in ways that only the base tells.", hint="Name it: --base BASE."
            )
        named = by_component(adapters, base)
        models = models_of(base) if base.components else models_of(base, next(iter(named)))
        fits = {component: fitted(adapter, self.name, self.title) for component, adapter in named.items()}
        parts = [self._part(fit.adapter, component, models) for component, fit in fits.items()]
        tensors = {key: tensor for part in parts for key, tensor in part.tensors.items()}
        metadata = {"ss_network_module": self.network, **_facts([change for part in parts for change in part.changes])}
        for component, adapter in named.items():
            metadata |= travelling(component, adapter)
        write_tensors(file_in(target, FILE), tensors, metadata)
        return [step for fit in fits.values() for step in fit.steps] + [step for part in parts for step in part.steps]

    def names(self, component: str, models: Mapping[str, Base]) -> tuple[str, list[NetworkModule]]:
        """Return the beginning of the names of a component's modules, and the modules; none where that is not known."""
        return prefix_to_write(component, models), network_modules(models[component])

    def _part(self, adapter: CanonicalAdapter, component: str, models: Mapping[str, Base]) -> _Part:
        """Return what a file has of a component."""
        from veneer.formats.network_config import check_biases, scaled_inputs

        if component not in models:
            raise BaseModelError(
                f"The base has no component {component!r}; it has {', '.join(models)}.", hint="Give the whole pipeline."
            )
        base, inputs = models[component], scaled_inputs(adapter)
        prefix, modules = self.names(component, models)
        check_biases(adapter.modules.values(), inputs, base, self.title)
        changed = _changed(adapter, modules, base, self.title)
        changes = {module: _joined(adapter, module, base) for module in changed}
        tensors = {
            f"{prefix}{module.name.replace('.', '_')}.{leaf}": tensor
            for module, change in changes.items()
            for leaf, tensor in _file_leaves(change, bool(inputs.intersection(module.paths))).items()
        }
        joined = tuple(path for m in changed if len(m.paths) > 1 for path in m.paths if path in adapter.modules)
        what = "joined to layers as the model was published, where the ranks add up"
        return _Part(list(changes.values()), tensors, [Step("exact", what, joined)] if joined else [])


@dataclass(frozen=True)
class _Part:
    """Holds what a file has of one component."""

    changes: list[ModuleChange]
    tensors: Mapping[str, Tensor]
    steps: list[Step]


def network_header(source: Source) -> Header | None:
    """Read the header of the file that a source is, or of the only safetensors file in its folder."""
    name = None if source.file is not None else only_file(source)
    return header_of(source, *([name] if name else []))


def network_keys(source: Source) -> list[str]:
    """Return the keys of a file whose names begin as kohya's, LyCORIS' or ComfyUI's; none for another file."""
    header = network_header(source)
    keys = list(header.tensors) if header is not None else []
    return keys if keys and all(key.startswith((*PREFIXES, *DOTTED)) for key in keys) else []


def file_in(target: Path, name: str) -> Path:
    """Return the file to write: the target, or one in the folder that it is."""
    return target if target.suffix == SAFETENSORS else target / name


def travelling(component: str, adapter: CanonicalAdapter) -> dict[str, str]:
    """Return the metadata in which a component's config travels."""
    return {f"{component}:{key}": value for key, value in original_config.metadata_of(adapter).items()}


def arrived(component: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a component: its config that travelled, and all that belongs to no component."""
    bare = {key.removeprefix(f"{component}:"): value for key, value in metadata.items()}
    return {key: value for key, value in bare.items() if ":" not in key and key != "format"}


def _of_component(
    modules: Sequence[FileModule], component: str | None, models: Mapping[str, Base], origin: str
) -> list[FileModule]:
    if component is None:
        return list(modules)
    chosen = [module for module in modules if belongs_to(module.name, component, models)]
    if not chosen:
        raise BindError(f"{origin} has nothing for {component}.", hint=f"Its first name is {modules[0].name}.")
    return chosen


def _adapter(
    component: str, modules: Iterable[FileModule], places: Mapping[str, Place], header: Header, origin: str
) -> CanonicalAdapter:
    """Return the adapter of one component."""
    from veneer.formats.network_config import config_of
    from veneer.formats.network_leaves import scales_inputs

    modules = [module for module in modules if places[module.name].component == component]
    changes = [change for module in modules for change in _changes(module, places[module.name], origin)]
    repeated, times = Counter(change.path for change in changes).most_common(1)[0]
    if times > 1:
        raise BindError(f"{origin}: two names mean {repeated}.", hint="The file is a mixture of two adapters.")
    base = places[modules[0].name].base
    metadata = arrived(component, header.metadata)
    adapter = CanonicalAdapter({c.path: c for c in changes}, metadata=metadata, notes=_notes(modules))
    inputs = [places[m.name].module.paths[0] for m in modules if scales_inputs(m)]
    return config_of(adapter, inputs, base, origin)


def _changes(module: FileModule, place: Place, origin: str) -> list[ModuleChange]:
    from veneer.formats.fused_layers import parted, swapped
    from veneer.formats.network_leaves import change_in, renamed

    change = change_in(module, place.shape, origin)
    if place.module.is_swapped:
        change = swapped(change)
    if len(place.module.paths) == 1:
        return [renamed(change, place.module.paths[0])]
    return parted(change, place.module.paths, place.rows)


def _notes(modules: Iterable[FileModule]) -> tuple[str, ...]:
    listed = list(modules)
    notes = {
        "no alpha: the scale is 1": [m for m in listed if "alpha" not in m.leaves and "on_input" not in m.leaves],
        "alpha 0, which means the rank: the scale is 1": [m for m in listed if not m.leaves.get("alpha", True)],
        "a Tucker core (lora_mid) multiplied into A": [m for m in listed if "lora_mid.weight" in m.leaves],
        "both factors of LoKr whole: the scale is 1 whatever alpha says": [
            m for m in listed if {"lokr_w1", "lokr_w2"} <= m.leaves.keys()
        ],
    }
    return tuple(f"{what} ({len(named)} modules, such as {named[0].name})" for what, named in notes.items() if named)


def _changed(
    adapter: CanonicalAdapter, modules: Sequence[NetworkModule], base: Base, title: str
) -> list[NetworkModule]:
    """Return the modules of the published model that an adapter changes."""
    if not modules:
        raise UnsupportedError(
            f"The names that {title} has for the modules of {base.origin} are not known here.",
            hint="Write what diffusers and ComfyUI read: --to diffusers, --to comfyui or --to lycoris.",
        )
    named = {path for module in modules for path in module.paths}
    unnamed = [path for path in adapter.modules if path not in named]
    if unnamed:
        raise UnsupportedError(
            f"{title} has no name for {len(unnamed)} of the adapter's modules: {unnamed[0]}.",
            hint="Is the base the adapter's own? Else train without them, or write --to diffusers.",
        )
    return [module for module in modules if any(path in adapter.modules for path in module.paths)]


def _joined(adapter: CanonicalAdapter, module: NetworkModule, base: Base) -> ModuleChange:
    """Return an adapter's change of a module of the published model."""
    from veneer.formats.fused_layers import joined, swapped
    from veneer.formats.network_leaves import renamed

    if len(module.paths) == 1:
        change = renamed(adapter.modules[module.paths[0]], module.name)
    else:
        rows = [base.shapes[f"{path}.weight"][0] for path in module.paths]
        change = joined(module.name, [adapter.modules.get(path) for path in module.paths], rows)
    return swapped(change) if module.is_swapped else change


def _file_leaves(change: ModuleChange, is_on_input: bool) -> Mapping[str, Tensor]:
    from veneer.formats.network_leaves import file_leaves, is_whole_lokr
    from veneer.formats.scaling import folded

    return file_leaves(folded(change, 1.0) if is_whole_lokr(change) else change, is_on_input)


def _facts(changes: Sequence[ModuleChange]) -> dict[str, str]:
    """Return the metadata of kohya's that tell rank, alpha and method."""
    from veneer.formats.scaling import effective_alpha

    ranks = {change.rank for change in changes}
    alphas = {effective_alpha(change) for change in changes}
    methods = sorted({change.method.lower() for change in changes})
    return {
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        "ss_network_args": json.dumps({"algo": methods[0]} if methods != ["lora"] else {}),
    }
