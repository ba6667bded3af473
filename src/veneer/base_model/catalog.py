"""Looks up a base model's modules by name, once for all its adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from veneer.base_model.default_targets import default_targets
from veneer.base_model.sites import bias_site, is_linear, is_never_called, kinds, refusal, sites_for, whole_sites
from veneer.base_model.sites.parameter import ParameterSite
from veneer.base_model.sites.parameter_reader import LIVE, ParameterReader
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import (
    ALL_LINEAR,
    is_inside,
    names_match,
    saved_modules,
    shortest,
    shown_names,
    target_names,
)
from veneer.base_model.transformers_internals import renames_of
from veneer.configs.base import AnyConfig, TargetedConfig
from veneer.errors import TargetError

_NO_TARGETS = (
    "No `target_modules` passed but also no `target_parameters` found. Please check the values for these arguments"
)


class Catalog:
    """The modules of a base model that carries no adapter: see :func:`veneer.layers.wrapping.check_untouched`.

    Args:
        model: the model.
        reader: reads the parameters of its layers, for each site.
        modules: name -> module, where adapted layers stand in the model.
    """

    def __init__(
        self, model: nn.Module, reader: ParameterReader = LIVE, modules: dict[str, nn.Module] | None = None
    ) -> None:
        self.model = model
        self.reader = reader
        self.modules = dict(model.named_modules()) if modules is None else modules
        # Results of before: the adapters of one model mostly have one config.
        self._targets: dict[tuple[Any, ...], list[str]] = {}
        self._sites: dict[tuple[Any, ...], list[Site]] = {}

    @cached_property
    def _holders(self) -> Counter[int]:
        """The number of parameters whose memory begins at an address, by that address."""
        parameters = (p for module in self.modules.values() for p in module._parameters.values())
        return Counter(_address(p) for p in parameters if p is not None)

    def is_alone(self, parameter: nn.Parameter) -> bool:
        """Tell whether a parameter has memory, and shares it with no other parameter of the model."""
        address = _address(parameter)
        return address != 0 and self._holders[address] == 1

    @cached_property
    def linear(self) -> dict[str, bool]:
        """Each module's name -> True if "all-linear" means it."""
        return {name: is_linear(module) for name, module in self.modules.items()}

    @cached_property
    def never_called(self) -> frozenset[str]:
        """The layers whose ``forward`` is never called, so that an adapter there would never act."""
        return frozenset(name for name, module in self.modules.items() if is_never_called(module))

    @cached_property
    def renamed(self) -> Callable[[str], str]:
        """Turns a module's name in an older version of transformers into its name now; others stay as they are."""
        return renames_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the model's first parameter that has one."""
        parameters = (p for module in self.modules.values() for p in module._parameters.values())
        return next((p.dtype for p in parameters if p is not None and p.is_floating_point()), torch.float32)

    @property
    def model_type(self) -> str | None:
        """The family in the model's config."""
        config = getattr(self.model, "config", None)
        model_type = getattr(config, "model_type", None)
        if config is not None and not isinstance(model_type, str) and hasattr(config, "to_dict"):
            model_type = config.to_dict().get("model_type")
        return model_type if isinstance(model_type, str) else None

    def describe(self) -> str:
        """Return the model's class and origin, for errors."""
        origin = getattr(self.model, "name_or_path", "") or ""
        return type(self.model).__name__ + (f" from {origin}" if origin else "")

    def _embedding(self, end: str) -> list[str]:
        """Return the name of the model's input or output embedding, in a list; empty when it has none."""
        get = getattr(self.model, f"get_{end}_embeddings", None)
        try:
            layer = get() if get is not None else None
        except (NotImplementedError, AttributeError):  # transformers' own for models without one
            layer = None
        known = {id(module) for module in self.modules.values()}
        while layer is not None and id(layer) not in known:  # a wrapper in its place holds it
            layer = layer._modules.get("base_layer", layer._modules.get("original_module"))
        return [name for name, module in self.modules.items() if layer is not None and module is layer]

    @cached_property
    def input_embeddings(self) -> list[str]:
        """The name of the input embedding, in a list; empty for a model without one."""
        return self._embedding("input")

    @cached_property
    def output_embeddings(self) -> list[str]:
        """The name of the output embedding, in a list; empty for a model without one."""
        return self._embedding("output")

    def is_behind_backbone(self, name: str) -> bool:
        """Tell whether a module sees the backbone's output, of which ``logits_to_keep`` may leave some tokens alone."""
        backbone = str(getattr(self.model, "base_model_prefix", ""))
        return bool(backbone) and backbone in self.modules and not is_inside(name, [backbone])

    @cached_property
    def shared(self) -> list[list[tuple[str, str]]]:
        """The places of each parameter that the base has in several: the module, and the parameter's name there."""
        groups: dict[int, list[tuple[str, str]]] = {}
        for name, module in self.modules.items():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    groups.setdefault(id(parameter), []).append((name, leaf))
        return [places for places in groups.values() if len(places) > 1]

    @property
    def tied(self) -> list[list[str]]:
        """The modules of the base that share their weight, a list for each weight."""
        return [[name for name, leaf in places if leaf == "weight"] for places in self.shared]

    @property
    def tied_embeddings(self) -> list[tuple[str, str]]:
        """The input embedding and each layer that shares its weight, such as the output embedding, in pairs."""
        return [(a, b) for a in self.input_embeddings for group in self.tied if a in group for b in group if a != b]

    def is_embedding(self, name: str) -> bool:
        """Tell whether a module is the model's input or output embedding."""
        return name in self.input_embeddings or name in self.output_embeddings

    def targets(self, config: TargetedConfig) -> list[str]:
        """Return the names of the modules that ``config`` adapts, in the model's order.

        Raises:
            TargetError: there is none, and no parameter that the config names either.
        """
        key = _signature(config)
        if key not in self._targets:
            self._targets[key] = self._find_targets(config)
        return list(self._targets[key])

    def _find_targets(self, config: TargetedConfig) -> list[str]:
        parameters = getattr(config, "target_parameters", None)
        if parameters and not config.target_modules:
            self.check_parameters(parameters)
            return []
        try:
            return target_names(config, self.linear, model_type=self.model_type, outputs=self.output_embeddings)
        except TargetError:
            if not self.parameter_sites(parameters or ()):
                raise
            return []

    def whole_modules(self, config: AnyConfig) -> list[str]:
        """Return the names of the modules that ``config`` saves whole."""
        return saved_modules(config, self.modules)

    def sites_at(self, name: str, whole: bool = False) -> list[Site]:
        """Return the sites of a module; more kinds of module have one for a method that trains ``whole`` layers."""
        module = self.modules[name]
        weight = module._parameters.get("weight")
        # A merge may have put a module or a weight of another kind there.
        key = (name, whole, id(module), type(weight), None if weight is None else weight.dtype)
        if key not in self._sites:
            self._sites[key] = self._with_reader((whole_sites if whole else sites_for)(name, module))
        return list(self._sites[key])

    def _with_reader(self, sites: list[Site]) -> list[Site]:
        """Give sites the catalog's reader."""
        for site in sites:
            site.reader = self.reader
        return sites

    def sites(self, config: TargetedConfig, whole: bool = False) -> list[Site]:
        """Return the sites of the layers that ``config`` adapts; with ``whole`` these can be norms and the like too.

        Raises:
            TargetError: nothing matches, or a matched module is of a kind that cannot carry an adapter.
        """
        by_layer = {name: self.sites_at(name, whole) for name in self.targets(config)}
        refused = [name for name, sites in by_layer.items() if not sites]
        if refused:
            kind = type(self.modules[refused[0]]).__name__
            why = refusal(self.modules[refused[0]])
            raise TargetError(
                f"{len(refused)} of the modules that target_modules={shown_names(config.target_modules)} means cannot "
                f"carry an adapter; the first is {refused[0]} ({kind})"
                + (f": {why}." if why else ".")
                + f" Target module {kind} is not supported.",
                hint=f"Kinds that can: {kinds()}, with a floating-point weight. Narrow target_modules, or name "
                "these in exclude_modules.",
            )
        return [site for sites in by_layer.values() for site in sites]

    def parameter_sites(self, targets: Collection[str]) -> list[Site]:
        """Return the sites of the parameters that ``target_parameters`` names, in full or by dotted endings.

        The checkpoint keys of several on one module have ``base_layer.`` once for each that was registered later.
        """
        sites: list[Site] = []
        for name, module in self.modules.items():
            parameters = [p for p in module._parameters if names_match(f"{name}.{p}", targets)]
            if parameters and not name:
                top = f"(parameter {parameters[0]!r})"
                raise TargetError(
                    f"Targeting an nn.Parameter on the top-level module is not supported {top}.",
                    hint="Adapt a module that has this one as a child.",
                )
            for place, parameter in enumerate(parameters):
                key = name + ".base_layer" * (len(parameters) - 1 - place)
                swapped = bool(getattr(module, "is_transposed", False))
                sites.append(ParameterSite(name, module, parameter, key, swapped, targeted=True))
        odd = [site for site in sites if site.stored.ndim not in (2, 3)]
        if odd:
            raise self._no_parameter(targets, f"means {odd[0].id}, which is no matrix")
        return self._with_reader(sites)

    def check_parameters(self, targets: Collection[str]) -> None:
        """Raise ``TargetError`` where ``target_parameters`` matches no parameter."""
        if not self.parameter_sites(targets):
            raise self._no_parameter(targets, f"matches no parameter. {_NO_TARGETS}")

    def _no_parameter(self, targets: Collection[str], what: str) -> TargetError:
        experts = [n for n, p in self.model.named_parameters() if p.ndim == 3][:3]
        return TargetError(
            f"target_parameters={list(targets)!r} {what}.",
            hint=f"Fused experts here: {', '.join(experts)}." if experts else "Use target_modules for layers.",
        )

    def bias_sites(self, config: TargetedConfig, without: Iterable[Site]) -> list[Site]:
        """Return the sites of the biases of layers that are neither among ``without`` nor saved whole."""
        taken = {site.name for site in without}
        again = {other for others in self._tied_biases.values() for other in others}
        names = [name for name in self._biased if name not in taken | again and self._user(name) not in taken]
        saved = self.whole_modules(config)
        return self._with_reader([self._bias_site(name, name) for name in names if not is_inside(name, saved)])

    def inner_bias_sites(self, sites: Iterable[Site]) -> list[Site]:
        """Return the sites of the biases that adapted layers use themselves: of attention's output projection."""
        taken = {site.name for site in sites}
        keys = {
            name: f"{user}.base_layer{name.removeprefix(user)}" for name in self._biased if (user := self._user(name))
        }
        return self._with_reader(
            [self._bias_site(name, key) for name, key in keys.items() if self._user(name) in taken]
        )

    def bias_twins(self, sites: Iterable[Site]) -> dict[str, list[Site]]:
        """Return the sites of other modules that hold a layer's bias too: BERT's output layer is in such a one."""
        tied = self._tied_biases
        return {
            site.id: [self._bias_site(other, other) for other in tied[site.name]] for site in sites if site.name in tied
        }

    def _bias_site(self, name: str, key: str) -> Site:
        return bias_site(name, self.modules[name], self.modules[name.rpartition(".")[0]], key)

    def _user(self, name: str) -> str:
        """Return the name of the module that computes with a layer's parameters itself; nothing where that is none."""
        return name.rpartition(".")[0] if name in self.never_called else ""

    @property
    def _biased(self) -> list[str]:
        """The names of the modules that hold a bias."""
        return [name for name, module in self.modules.items() if module._parameters.get("bias") is not None]

    @cached_property
    def _tied_biases(self) -> dict[str, list[str]]:
        """A layer's name -> the names of the other modules that hold its bias."""
        holders: dict[int, list[str]] = {}
        for name in self._biased:
            holders.setdefault(id(self.modules[name]._parameters["bias"]), []).append(name)
        # The layer itself has no children.
        groups = [sorted(names, key=lambda name: bool(self.modules[name]._modules)) for names in holders.values()]
        return {first: others for first, *others in groups if others}

    def token_sites(self, tokens: Iterable[int] | Mapping[str, Iterable[int]]) -> list[Site]:
        """Return the sites of the embeddings that ``trainable_token_indices`` means: tokens, or tokens by module."""
        if not isinstance(tokens, Mapping):
            return [site for name in self.input_embeddings for site in self.sites_at(name)]
        names = [name for name in self.modules if names_match(name, list(tokens))]
        missing = [key for key in tokens if not any(names_match(name, [key]) for name in names)]
        if missing:
            raise TargetError(
                f"Target modules {{{missing[0]!r}}} not found in the base model. trainable_token_indices names it.",
                hint=f"Its embedding is {' or '.join(self.input_embeddings) or 'unknown'}.",
            )
        return [site for name in names for site in self.sites_at(name)]

    def sharing(self, name: str) -> list[Site]:
        """Return the sites of the other modules that share a module's weight, such as an output layer."""
        group = next((group for group in self.tied if name in group), ())
        return [site for other in group if other != name for site in self.sites_at(other)]

    def write_out_targets(self, config: TargetedConfig, chosen: list[str]) -> None:
        """Write the targets' names over "all-linear" or nothing, so that a saved config means the same anywhere."""
        usual = default_targets(str(config.peft_type), self.model_type) if config.target_modules is None else None
        if isinstance(usual, str) and usual != ALL_LINEAR:
            config.target_modules = usual
        elif config.target_modules in (None, ALL_LINEAR):
            free = [n for n in self.modules if not names_match(n, config.exclude_modules)]
            config.target_modules = set(shortest(chosen, free) if config.layers_to_transform is None else chosen)


def _signature(config: TargetedConfig) -> tuple[Any, ...]:
    """Return the config fields that select modules, as a cache key."""
    names = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save")
    return tuple(repr(getattr(config, name, None)) for name in (*names, "layers_to_transform", "layers_pattern"))


def _address(parameter: nn.Parameter) -> int:
    """Return the address of a parameter's memory; 0 where it has none, or torch does not tell."""
    values = parameter.data
    return values.data_ptr() if type(values) is torch.Tensor else 0
