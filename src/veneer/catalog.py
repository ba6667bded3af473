"""A base model's modules by name: looked up once, however many adapters come."""

from __future__ import annotations

from functools import cached_property

from torch import nn

from veneer.config import TargetedConfig
from veneer.errors import BaseModelError, TargetError
from veneer.layer import AdaptedLayer
from veneer.saved import SavedModule
from veneer.site import Site, is_linear, kinds, site_for
from veneer.targets import ALL_LINEAR, names_match, saved_modules, shortest, target_names


class Catalog:
    """The modules of a base model that carries no adapter.

    Raises:
        BaseModelError: the model carries adapters already.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        for name, module in self.modules.items():
            if isinstance(module, (AdaptedLayer, SavedModule)):
                raise BaseModelError(
                    f"The base model already carries adapters (first at {name}); wrapping it twice would stack them.",
                    hint="Add another with load_adapter(...) or add_adapter(...) on the model that has them, or "
                    "call its unload() first.",
                )

    @cached_property
    def linear(self) -> dict[str, bool]:
        """Every module's name -> whether "all-linear" means it."""
        return {name: is_linear(module) for name, module in self.modules.items()}

    @property
    def model_type(self) -> str | None:
        """The family in the model's config."""
        found = getattr(getattr(self.model, "config", None), "model_type", None)
        return found if isinstance(found, str) else None

    def describe(self) -> str:
        """The model in a few words, for errors."""
        origin = getattr(self.model, "name_or_path", "") or ""
        return type(self.model).__name__ + (f" from {origin}" if origin else "")

    def _outputs(self) -> list[str]:
        get = getattr(self.model, "get_output_embeddings", None)
        output = get() if get is not None else None
        return [name for name, module in self.modules.items() if output is not None and module is output]

    def targets(self, config: TargetedConfig) -> list[str]:
        """The names that ``config`` adapts, in the model's order (``TargetError`` when there are none)."""
        return target_names(config, self.linear, model_type=self.model_type, outputs=self._outputs())

    def saved(self, config: TargetedConfig) -> list[str]:
        """The names of the modules that ``config`` saves whole."""
        return saved_modules(config, self.modules)

    def site(self, name: str) -> Site | None:
        """The site of a module that can carry an adapter, else ``None``."""
        return site_for(name, self.modules[name])

    def sites(self, config: TargetedConfig) -> list[Site]:
        """The sites that ``config`` adapts.

        Raises:
            TargetError: nothing matches, or a matched module is of a kind that cannot carry an adapter.
        """
        found = {name: self.site(name) for name in self.targets(config)}
        refused = [name for name, site in found.items() if site is None]
        if refused:
            kind = type(self.modules[refused[0]]).__name__
            raise TargetError(
                f"{len(refused)} of the modules that target_modules={config.target_modules!r} means cannot carry an "
                f"adapter; the first is {refused[0]} ({kind}).",
                hint=f"Kinds that can: {kinds()}, with a floating-point weight. Narrow target_modules, or name "
                "these in exclude_modules.",
            )
        return [site for site in found.values() if site is not None]

    def spell_out(self, config: TargetedConfig, chosen: list[str]) -> None:
        """Put names in the place of "all-linear" or nothing, so that a saved config means the same anywhere."""
        if config.target_modules in (None, ALL_LINEAR):
            free = [n for n in self.modules if not names_match(n, config.exclude_modules)]
            config.target_modules = shortest(chosen, free) if config.layers_to_transform is None else chosen
