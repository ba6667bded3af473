"""Finds what formats need of a base: its config, and its parameters as the model in memory names them.

Nothing of it is looked at before it is needed: building a model without memory takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from veneer.base_model.plain_families import EMBEDDING, HEAD, is_tied, plain_shapes
from veneer.errors import BaseModelError, SourceError
from veneer.files.base_map import places_of
from veneer.files.gguf_header import SUFFIX, read_gguf_header
from veneer.files.lookup_options import OFFLINE, LookupOptions
from veneer.files.names import ADAPTER_CONFIG, MODEL_CONFIG, PIPELINE_INDEX, SAFETENSORS
from veneer.files.resolve import resolve
from veneer.files.safetensors_header import read_header
from veneer.files.source import Source
from veneer.formats.format import Base

if TYPE_CHECKING:
    from torch import nn

    from veneer.base_model.catalog import Catalog

V = TypeVar("V")


# What a GGUF file says that it is, if it is a model; older ones say nothing.
_MODEL = ("model", None)


class OnDemand(Mapping[str, V], Generic[V]):
    """A mapping that is made when it is first used.

    Args:
        make: makes it.
    """

    def __init__(self, make: Callable[[], Mapping[str, V]]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> Mapping[str, V]:
        return self._make()

    def __getitem__(self, key: str) -> V:
        return self._made[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def base_on_disk(source: Source, gguf_file: str | None = None) -> Base:
    """Return the facts of a base on disk: a model of transformers, one of another library, or a pipeline of several.

    Args:
        source: the base; one without a config may be a GGUF file.
        gguf_file: the name of that file in the folder; by default the first one there that is a model.

    Raises:
        BaseModelError: there is none.
    """
    if source.file is None and source.has(PIPELINE_INDEX):
        return _pipeline(source)
    config = source.json(MODEL_CONFIG) if source.file is None and source.has(MODEL_CONFIG) else {}
    plain = plain_shapes(config)
    if plain is not None:
        return Base(source.origin, config, plain, {HEAD: EMBEDDING} if is_tied(config) else {})
    if "model_type" in config:
        return _of_model(source.origin, config, lambda: _meta(source, config))
    gguf = _gguf_model(source, gguf_file)
    if gguf is not None:
        return _in_gguf(source, gguf)
    if not _weight_files(source) or (source.has(ADAPTER_CONFIG) and not config):
        raise BaseModelError(f"{source.origin} holds no model.", hint="Give the folder of the adapter's base.")
    return Base(source.origin, config, OnDemand(lambda: _stored_shapes(source)))


def _gguf_model(source: Source, named: str | None) -> str | None:
    """Return the name of the GGUF file that is a base."""
    if source.file is not None:
        return source.file.name if source.file.suffix == SUFFIX else None
    names = [name for name in source.files() if name.endswith(SUFFIX)]
    models = (name for name in names if read_gguf_header(source.path(name)).values.get("general.type") in _MODEL)
    return named or next(models, None)


def _in_gguf(source: Source, file: str) -> Base:
    """Return the facts of a base in a GGUF file, as transformers reads it."""
    import transformers

    from veneer.base_model.gguf_config import gguf_config
    from veneer.base_model.meta_model import meta_model
    from veneer.base_model.transformers_internals import classes_for

    config = gguf_config(source, file)
    config["architectures"] = list(classes_for("AutoModelForCausalLM", config["model_type"]))[:1]

    kind = transformers.AutoModelForCausalLM
    return _of_model(source.origin, config, lambda: meta_model(kind, source, gguf_file=file))


def _of_model(origin: str, config: Mapping[str, Any], make: Callable[[], nn.Module]) -> Base:
    """Return the facts of a model that ``make`` builds without memory, when they are asked for."""
    models = OnDemand(lambda: {"": make()})
    parameters = OnDemand(lambda: dict(models[""].named_parameters(remove_duplicate=False)))

    def catalog() -> Catalog:
        from veneer.base_model.catalog import Catalog

        return Catalog(models[""])

    return Base(
        origin, config, OnDemand(lambda: _shapes(parameters)), OnDemand(lambda: _ties(parameters)), catalog=catalog
    )


def base_in_memory(catalog: Catalog) -> Base:
    """Return the facts of a base in memory, which may carry adapters."""
    config = getattr(catalog.model, "config", None)
    values = dict(config or {}) if config is None or isinstance(config, Mapping) else config.to_dict()
    values["architectures"] = values.get("architectures") or [type(catalog.model).__name__]
    parameters = {
        f"{name}.{leaf}" if name else leaf: parameter
        for name, module in catalog.modules.items()
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }
    origin = f"the {type(catalog.model).__name__} in memory"
    return Base(origin, values, _shapes(parameters), _ties(parameters), catalog=lambda: catalog)


def given_base(base: str | Path | nn.Module | None, lookup: LookupOptions, gguf_file: str | None = None) -> Base | None:
    """Return the facts of a base that a user names by its path or hub id, or gives in memory."""
    if base is None:
        return None
    if isinstance(base, (str, Path)):
        return base_on_disk(_files_of(base, lookup.for_base(None)), gguf_file)
    from veneer.base_model.catalog import Catalog

    return base_in_memory(Catalog(base))


def _files_of(base: str | Path, lookup: LookupOptions) -> Source:
    """Find a base; from the hub its configs alone, where a model of transformers needs no more."""
    configs = resolve(base, lookup, what="base", patterns=("*.json",))
    is_enough = configs.file is None and configs.has(MODEL_CONFIG) and "model_type" in configs.json(MODEL_CONFIG)
    return configs if is_enough else resolve(base, lookup, what="base")


def named_base(name: str | None, source: Source) -> Base | None:
    """Return the facts of the base that an adapter at ``source`` names, where it is on this machine."""
    for place in places_of(name, source.root) if name else ():
        with suppress(SourceError, BaseModelError):
            return base_on_disk(resolve(place, OFFLINE, what="base"))
    return None


def _pipeline(source: Source) -> Base:
    """Return the facts of a pipeline of diffusers, whose components are folders with models."""
    folders = [source.root / name for name in source.json(PIPELINE_INDEX)]
    components = {
        folder.name: base_on_disk(Source(folder, f"{source.origin}/{folder.name}"))
        for folder in folders
        if (folder / MODEL_CONFIG).is_file()
    }
    return Base(source.origin, source.json(PIPELINE_INDEX), {}, components=components)


def _meta(source: Source, config: dict[str, Any]) -> nn.Module:
    import transformers

    from veneer.base_model.meta_model import meta_model
    from veneer.base_model.transformers_internals import named_class

    return meta_model(named_class(config) or transformers.AutoModel, source)


def _shapes(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in parameters.items()}


def _ties(parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Return the names of parameters that are one, each with the first of them: ``lm_head.weight`` -> the embedding."""
    first: dict[int, str] = {}
    for name, parameter in parameters.items():
        first.setdefault(id(parameter), name)
    return {name: first[id(parameter)] for name, parameter in parameters.items() if first[id(parameter)] != name}


def _weight_files(source: Source) -> list[str]:
    if source.file is not None:
        return [source.file.name]
    return [name for name in source.files() if name.endswith(SAFETENSORS)]


def _stored_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in the files of a model whose library stores parameters by their names."""
    headers = [read_header(source.path(name)) for name in _weight_files(source)]
    return {name: info.shape for header in headers for name, info in header.tensors.items()}
