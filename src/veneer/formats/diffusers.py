"""diffusers' format: a safetensors file for all components of a pipeline, with their LoraConfigs in its metadata."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BindError, CorruptFileError
from veneer.files.names import SAFETENSORS
from veneer.files.safetensors_header import Header
from veneer.files.source import Source
from veneer.formats.canonical import CanonicalAdapter, ModuleChange
from veneer.formats.components import COMPONENTS, TEXT_ENCODERS, by_component, component_of, model_of
from veneer.formats.format import Base, ReadOptions, Step
from veneer.formats.kohya import arrived, file_in, travelling
from veneer.formats.network_modules import in_files, layers
from veneer.formats.network_names import DOTTED, PREFIXES
from veneer.formats.tensor_files import header_of, only_file, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from veneer.formats.network_leaves import FileModule

FILE = f"pytorch_lora_weights{SAFETENSORS}"
METADATA = "lora_adapter_metadata"
_PARTS = tuple(f"{component}." for component in COMPONENTS)
_OF_ADAPTERS = re.compile(r"[._](lora|lokr)(_|\.)|\.alpha$")
# How attention was named before PEFT: ``...attn1.processor.to_q_lora.down.weight``.
_PROCESSOR = re.compile(r"(\.processor)?\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_LEAVES = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector",
}
# The options of a LoraConfig that say what the tensors mean; the others are of the training.
_OPTIONS = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"),
)


class DiffusersFormat:
    """diffusers' format."""

    name: ClassVar[str] = "diffusers"
    title: ClassVar[str] = "diffusers"
    reads: ClassVar[bool] = True
    writes: ClassVar[bool] = True

    def recognise(self, source: Source) -> bool:
        """Tell by the metadata, or by keys that begin with components and end with factors."""
        header = _header(source)
        if header is None or not header.tensors:
            return False
        keys = list(header.tensors)
        if METADATA in header.metadata:
            return True
        if any(key.startswith((*PREFIXES, *DOTTED)) for key in keys):
            return False
        is_named_so = header.path.name == FILE or all(key.startswith(_PARTS) for key in keys)
        return is_named_so and any(_OF_ADAPTERS.search(key) for key in keys)

    def read(self, source: Source, options: ReadOptions) -> Mapping[str, CanonicalAdapter]:
        """Read a file: component -> adapter."""
        from veneer.formats.network_leaves import by_module, check_methods

        header = _header(source)
        if header is None:
            raise BindError(f"{source.origin} holds no such file.", hint="Give the .safetensors file itself.")
        configs = _configs(header, source.origin)
        tensors = {_current(key): tensor for key, tensor in read_tensors(header).items()}
        by_part: dict[str, list[FileModule]] = defaultdict(list)
        modules = by_module(tensors, source.origin)
        check_methods(modules, source.origin)
        for module in modules:
            part, _, path = module.name.partition(".")
            is_part = part in COMPONENTS
            by_part[part if is_part else ""].append(replace(module, name=path) if is_part else module)
        components = _components(by_part, options, source.origin)
        return {
            component: _adapter(component, by_part[part], configs, header, options, source.origin)
            for component, part in components.items()
        }

    def write(self, adapters: Mapping[str, CanonicalAdapter], target: Path, base: Base | None) -> list[Step]:
        """Write a file; a ``target`` that does not end in .safetensors is a folder for it."""
        from veneer.formats.peft_layout import laid_out
        from veneer.formats.scaling import fitted

        tensors: dict[str, Tensor] = {}
        configs: dict[str, Any] = {}
        metadata: dict[str, str] = {}
        steps: list[Step] = []
        for component, adapter in by_component(adapters, base).items():
            fit = fitted(adapter, self.name, self.title)
            config, keyed = laid_out(fit.adapter, model_of(base, component))
            tensors |= in_component(component, keyed)
            configs |= {f"{component}.{option}": value for option, value in _options(config).items()}
            metadata |= travelling(component, adapter)
            steps += fit.steps
        metadata[METADATA] = json.dumps(configs, indent=2, sort_keys=True)
        write_tensors(file_in(target, FILE), tensors, metadata)
        return steps


def in_component(component: str, keyed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a component by a pipeline's keys, given PEFT's."""
    from veneer.files.tensor_keys import PREFIX

    paths = {key: key.removeprefix(PREFIX) for key in keyed}
    is_text = component in TEXT_ENCODERS
    return {f"{component}.{in_files(path) if is_text else path}": keyed[key] for key, path in paths.items()}


def _header(source: Source) -> Header | None:
    return header_of(source, FILE, *filter(None, [only_file(source) if source.file is None else None]))


def _configs(header: Header, origin: str) -> dict[str, Any] | None:
    """Return the options of all components' configs; ``None`` where the file has none."""
    text = header.metadata.get(METADATA)
    if text is None:
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CorruptFileError(f"{origin}: its {METADATA} is no JSON object.", hint="Save or copy the file again.")
    return values


def _current(key: str) -> str:
    """Return a key as it is spelt since diffusers has PEFT."""
    match = _PROCESSOR.search(key)
    if match is None:
        return key.replace(".processor.", ".")
    _, name, factor = match.groups()
    if key.startswith(TEXT_ENCODERS):
        name = _OLD_TEXT[name]
    elif name == "to_out":
        name = "to_out.0"
    return f"{key[: match.start()]}.{name}.lora.{factor}.weight"


def _components(by_part: Mapping[str, Any], options: ReadOptions, origin: str) -> dict[str, str]:
    """Return the components that are wanted, and the beginnings of their keys: those of a model alone have none."""
    if list(by_part) == [""]:
        return {options.component or (component_of(options.base) if options.base is not None else ""): ""}
    if "" in by_part:
        raise BindError(
            f"{origin}: some keys begin with a component of a pipeline, and {by_part[''][0].name} does not.",
            hint="The file is a mixture of two.",
        )
    if options.component is None:
        return {part: part for part in by_part}
    if options.component not in by_part:
        raise BindError(f"{origin} has nothing for {options.component}.", hint=f"It is for {', '.join(by_part)}.")
    return {options.component: options.component}


def _adapter(
    component: str,
    modules: list[FileModule],
    configs: Mapping[str, Any] | None,
    header: Header,
    options: ReadOptions,
    origin: str,
) -> CanonicalAdapter:
    """Return the adapter of one component."""
    base = model_of(options.base, component)
    placed = [replace(module, name=_in_memory(module.name, base)) for module in modules]
    if base is not None:
        _check_places(placed, base, origin)
    metadata = {key: value for key, value in arrived(component, header.metadata).items() if key != METADATA}
    if configs is None:
        return _without_config(placed, base, metadata, origin)
    values = {key.removeprefix(f"{component}."): value for key, value in configs.items()}
    return _with_config(component, placed, {k: v for k, v in values.items() if "." not in k}, metadata, origin)


def _in_memory(path: str, base: Base | None) -> str:
    """Return the path of a text encoder's module as the model in memory names it, where that is known."""
    if base is None or f"{path}.weight" in base.shapes:
        return path
    bare = path.removeprefix("text_model.")
    return bare if f"{bare}.weight" in base.shapes else path


def _check_places(modules: list[FileModule], base: Base, origin: str) -> None:
    from veneer.errors import did_you_mean

    known = set(layers(base))
    lost = [module.name for module in modules if module.name not in known]
    if lost:
        more = f" {len(lost) - 1} more are none either." if len(lost) > 1 else ""
        raise BindError(
            f"{origin}: {lost[0]} is no layer of {base.origin}.{more}",
            problems=[f"{name} is no layer" for name in lost],
            hint=f"{did_you_mean(lost[0], sorted(known), str)}Give the base that it was trained on.",
        )


def _with_config(
    component: str, modules: list[FileModule], values: dict[str, Any], metadata: dict[str, str], origin: str
) -> CanonicalAdapter:
    """Return an adapter whose config is in the file, which then decides alone."""
    from veneer.configs.base import PeftConfig
    from veneer.files.tensor_keys import encode
    from veneer.formats.peft_layout import canonical

    alphas = [module.name for module in modules if "alpha" in module.leaves]
    if alphas:
        raise BindError(
            f"{origin} says alpha twice: in its metadata, and as {alphas[0]}.alpha.", hint="diffusers refuses it too."
        )
    if not values:
        raise BindError(
            f"{origin}: its metadata have no config for {component}, so that diffusers would take rank 8.",
            hint="Save it with the config of each component.",
        )
    method = "LOKR" if any("lokr" in leaf for module in modules for leaf in module.leaves) else "LORA"
    config = PeftConfig.from_dict({**values, "peft_type": method}, where=f"{origin}, its metadata")
    tensors = {
        encode(module.name, _LEAVES.get(leaf, leaf)): tensor
        for module in modules
        for leaf, tensor in module.leaves.items()
    }
    adapter = canonical(config, tensors, metadata, None, origin)
    if adapter.whole:
        raise BindError(f"{origin}: {next(iter(adapter.whole))} is no factor of a LoRA.", hint="Is the file whole?")
    return adapter


def _without_config(
    modules: list[FileModule], base: Base | None, metadata: dict[str, str], origin: str
) -> CanonicalAdapter:
    """Return an adapter of a file without metadata: alpha is the rank, but where a key has it."""
    from veneer.formats.network_leaves import unscaled_change

    changes: list[ModuleChange] = [unscaled_change(module, origin) for module in modules]
    silent = [module.name for module in modules if "alpha" not in module.leaves]
    notes = (
        (f"no metadata and no alpha: the scale is 1 ({len(silent)} modules, such as {silent[0]})",) if silent else ()
    )
    adapter = CanonicalAdapter({change.path: change for change in changes}, metadata=metadata, notes=notes)
    if base is None:
        return adapter
    from veneer.formats.network_config import config_of

    return config_of(adapter, (), base, origin)


def _options(config: Any) -> dict[str, Any]:
    """Return the options that say what a config's tensors mean, where they are not the defaults, as JSON has them."""
    values = config.to_dict()
    default = type(config)().to_dict()
    always = ("r", "lora_alpha", "target_modules")
    chosen = {option: values[option] for option in _OPTIONS if option in always or values[option] != default[option]}
    return {option: sorted(value) if isinstance(value, set) else value for option, value in chosen.items()}
