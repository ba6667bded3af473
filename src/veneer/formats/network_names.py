"""Finds the module of a base that a name in a file of kohya's, LyCORIS' or ComfyUI's means.

Such a name is a path with its dots turned into underscores, which nobody can turn back. So all names that the base's
modules can have are made, and looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from veneer.errors import BindError, did_you_mean
from veneer.formats.components import DENOISERS, TEXT_ENCODERS, is_t5
from veneer.formats.format import Base
from veneer.formats.network_modules import NetworkModule, own_modules, published_modules, text_modules

# The beginnings of names, of which the first part is enough to know such a file.
PREFIXES = ("lora_unet_", "lora_te", "lora_transformer_", "lora_prior_unet_", "lycoris_")
DOTTED = ("diffusion_model.", "text_encoders.")

_OF_DENOISERS = ("lora_unet_", "lora_transformer_", "lora_prior_unet_", "lycoris_")
_OF_TEXT: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
_IN_COMFYUI: Mapping[str, str] = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}
_T5_IN_COMFYUI = "text_encoders.t5xxl.transformer."


@dataclass(frozen=True)
class Place:
    """The modules of a base that a name in a file means."""

    component: str
    base: Base
    module: NetworkModule

    @property
    def rows(self) -> list[int]:
        """The rows of each module."""
        return [self.base.shapes[f"{path}.weight"][0] for path in self.module.paths]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight of the published layer."""
        first = self.base.shapes[f"{self.module.paths[0]}.weight"]
        return (sum(self.rows), *first[1:])


class NetworkNames:
    """Knows all names that files can have for the modules of some models.

    Args:
        models: component -> model.
    """

    def __init__(self, models: Mapping[str, Base]) -> None:
        self._places: dict[str, Place] = {}
        self._ambiguous: set[str] = set()
        for component, base in models.items():
            for name, module in _names(component, base, models):
                self._add(name, Place(component, base, module))

    def _add(self, name: str, place: Place) -> None:
        known = self._places.setdefault(name, place)
        if (known.component, known.module.paths) != (place.component, place.module.paths):
            self._ambiguous.add(name)

    def find(self, names: Iterator[str] | list[str], origin: str) -> dict[str, Place]:
        """Return the places that names mean.

        Args:
            names: the names of modules in a file.
            origin: the file, for errors.

        Raises:
            BindError: a name means nothing, or several modules.
        """
        listed = list(names)
        lost = [name for name in listed if name not in self._places or name in self._ambiguous]
        if lost:
            near = "" if lost[0] in self._places else did_you_mean(lost[0], self._places, str)
            more = f" {len(lost) - 1} more do not either." if len(lost) > 1 else ""
            raise BindError(
                f"{origin}: {self._problem(lost[0])}.{more}",
                problems=[self._problem(name) for name in lost],
                hint=f"{near}Give the base that it was trained on. From a file for several models take the "
                f"wanted one first: veneer convert {origin} NEW --base PIPELINE --component NAME.",
            )
        return {name: self._places[name] for name in listed}

    def _problem(self, name: str) -> str:
        what = "stands for several modules of the base" if name in self._ambiguous else "names no module of the base"
        return f"{name} {what}"


def prefix_to_write(component: str, models: Mapping[str, Base]) -> str:
    """Return the beginning that kohya's scripts give the names of a component's modules."""
    if component not in TEXT_ENCODERS:
        return "lora_unet_"
    if component == "text_encoder" and "text_encoder_2" not in models:
        return "lora_te_"
    return "lora_te3_" if is_t5(models[component]) else f"lora_te{TEXT_ENCODERS.index(component) + 1}_"


def belongs_to(name: str, component: str, models: Mapping[str, Base]) -> bool:
    """Tell whether a name in a file begins as those of a component do."""
    dotted = "diffusion_model." if component in DENOISERS else _in_comfyui(component, models[component])
    return name.startswith((*_prefixes(component, models), dotted))


def _prefixes(component: str, models: Mapping[str, Base]) -> tuple[str, ...]:
    if component in DENOISERS:
        return _OF_DENOISERS
    prefixes = _OF_TEXT.get(component, ())
    if is_t5(models[component]):
        prefixes = (*prefixes, "lora_te3_")
    # LyCORIS' own wrapper, around a model that is no part of a pipeline.
    return prefixes if len(models) > 1 else (*prefixes, "lycoris_")


def _in_comfyui(component: str, base: Base) -> str:
    return _T5_IN_COMFYUI if is_t5(base) else _IN_COMFYUI.get(component, f"{component}.")


def _names(component: str, base: Base, models: Mapping[str, Base]) -> Iterator[tuple[str, NetworkModule]]:
    modules = [*own_modules(base), *text_modules(base), *published_modules(base)]
    dotted = "diffusion_model." if component in DENOISERS else _in_comfyui(component, base)
    for module in modules:
        yield f"{dotted}{module.name}", module
        for prefix in _prefixes(component, models):
            yield prefix + module.name.replace(".", "_"), module
