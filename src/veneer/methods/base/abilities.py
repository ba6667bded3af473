"""The abilities that some methods have beyond the six members of every method, a class each.

A method that has one inherits from its class; whoever needs it asks with ``isinstance``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from veneer.base_model.sites.site import Site
from veneer.methods.base.method import AnyMethod, BaseLayer, Leaf, MethodOnSites

if TYPE_CHECKING:
    from veneer.base_model.catalog import Catalog


# -- tensors ---------------------------------------------------------------------------------------------------


class StoresShared(ABC):
    """Has tensors that belong to no layer, ``base_model.<name>`` in a checkpoint.

    Attributes:
        shared: these; the name ``"v"`` also means ``v.0``, ``v.1`` ...
    """

    shared: ClassVar[tuple[Leaf, ...]]

    @abstractmethod
    def shared_shapes(self, config: Any, sites: Sequence[Site]) -> Mapping[str, tuple[int, ...]]:
        """Return the name of each shared tensor and the shape that it must have."""

    def saves_shared(self, config: Any) -> bool:
        """Tell whether a checkpoint holds them; without them they can be made from the config."""
        return True


class SharesTensors(StoresShared):
    """Has tensors that all layers of an adapter use; they join the layer's own in what ``lower`` gets."""

    @abstractmethod
    def make_shared(
        self, config: Any, bases: Sequence[BaseLayer], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Return the shared tensors by name, in float32: for a new adapter, or where a checkpoint leaves them out."""

    def trains_shared(self, config: Any, name: str) -> bool:
        """Tell whether training changes a shared tensor."""
        return any(leaf.trained for leaf in self.shared if leaf.name == name.partition(".")[0])


class HoldsModules(SharesTensors):
    """Computes with whole modules beside the base's layers, which hold the shared tensors.

    The tensor ``leaf`` of the module ``name`` is the shared tensor ``<name>.default.<leaf>``, however the adapter is
    called: so it is in peft's checkpoints.
    """

    @abstractmethod
    def modules(
        self, config: Any, sites: Sequence[Site], tensors: Mapping[str, nn.Parameter]
    ) -> dict[str, nn.Module | None]:
        """Return the modules by their names under peft's tuner, with the shared tensors as their parameters."""


def module_leaf(module: str, leaf: str) -> str:
    """Return the name of a shared tensor by the module that holds it and its name there."""
    return f"{module}.default.{leaf}"


class DerivesTensors(ABC):
    """Works tensors out from config and base that a checkpoint need not hold; they are never trained."""

    @abstractmethod
    def extra_tensors(
        self, config: Any, bases: Sequence[BaseLayer], shared: Mapping[str, Tensor]
    ) -> Sequence[Mapping[str, Tensor]]:
        """Return what joins each layer's own tensors in what ``lower`` gets, shared tensors included.

        A tensor that a new adapter must have and ``init`` does not make is taken from here.
        """


class SharesBetweenLayers(ABC):
    """Lets several layers use one tensor in memory, of which a checkpoint holds a copy for each."""

    @abstractmethod
    def shared_between_layers(self, config: Any, sites: Sequence[Site]) -> Mapping[str, Sequence[int]]:
        """Return, for each such tensor's name, the index of the layer whose tensor each layer uses."""


class ChangesWhenSaved:
    """Holds other tensors in memory than in a checkpoint."""

    def on_disk(self, settings: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what is saved of a layer's tensors; those whose leaf is not ``saved`` are left out of it."""
        return tensors

    def config_on_disk(self, config: Any) -> Any:
        """Return the config that is saved with an adapter that has tensors in memory only."""
        return config

    def saves_as_it_is(self, config: Any) -> bool:
        """Tell whether a config asks to leave tensors that live in memory only out of what is saved."""
        return False

    def recomputed(self, config: Any, settings: Any, base: Callable[[], BaseLayer]) -> dict[str, Tensor]:
        """Return the tensors of a loaded layer that live in memory only."""
        return {}


# -- layers ----------------------------------------------------------------------------------------------------


class ChoosesLayers(ABC):
    """Decides by more than the config's targets which layers an adapter has."""

    @abstractmethod
    def parts(self, config: Any, catalog: Catalog) -> list[MethodOnSites]:
        """Return the layers that ``config`` means, and for each the methods that serve it."""


class CompletesConfig(ABC):
    """Knows which layers to adapt where a config leaves it open."""

    @abstractmethod
    def complete(self, config: Any, catalog: Catalog) -> None:
        """Fill in which layers a new adapter has."""


class VariesWithConfig(ABC):
    """Has other leaves with another config."""

    @abstractmethod
    def specialised(self, config: Any) -> AnyMethod:
        """Return the method with the leaves that ``config`` gives to a layer."""


class AdaptsTwins(ABC):
    """Changes other layers with a layer's tensors too: its twins, such as a tied output layer.

    Attributes:
        saves_twins: whether a checkpoint holds the tensors for a twin again.
        twins_repeat: whether a twin's tensors in a checkpoint are the layer's again; else they are its own.
    """

    saves_twins: ClassVar[bool] = False
    twins_repeat: ClassVar[bool] = True

    @abstractmethod
    def twin_settings(self, settings: Any, twin: Site) -> Any:
        """Return what a layer's ``settings`` mean for a twin; ``None`` where nothing."""


class TiesEmbeddings(ABC):
    """Can change an output layer by the tensors of the embedding whose weight it shares."""

    @abstractmethod
    def tied_output_settings(self, embedding: Any, output: Any) -> Any:
        """Return the output layer's settings that do so; ``None`` where the two cannot be changed alike."""


class SettledByCheckpoint:
    """Learns some of a layer's settings from the checkpoint only."""

    def settings_from_shapes(
        self, config: Any, settings: Any, site: Site, shapes: Mapping[str, tuple[int, ...]]
    ) -> Sequence[Any]:
        """Return the settings that tensors of such shapes can have been made with, the likeliest first."""
        return (settings,)

    def settings_from_tensors(self, settings: Any, tensors: Mapping[str, Tensor], base: BaseLayer) -> Any:
        """Return ``settings`` completed by a layer's tensors."""
        return settings


class SureToChange(ABC):
    """Tells without computing whether a layer is changed."""

    @abstractmethod
    def nonzero_means_change(self, settings: Any) -> bool:
        """Tell whether any layer is changed of which no tensor is all zero."""


class Exclusive:
    """Cannot be on layers for two active adapters: each would put another weight in the base's place."""


# -- use and training ------------------------------------------------------------------------------------------


class ActsFromTokens(ABC):
    """May act from certain tokens of a prompt on only."""

    @abstractmethod
    def invocation(self, config: Any) -> tuple[int, ...]:
        """Return the tokens; none where the adapter acts on all."""


class RefusesMerge(ABC):
    """May have no merged form."""

    @abstractmethod
    def check_mergeable(self, settings: Any, site: Site) -> None:
        """Raise ``MergeError`` where no weight can hold the change; asked of all layers before any is merged."""


class Penalised(ABC):
    """Adds to the loss of a model that is trained."""

    @abstractmethod
    def penalty(self, config: Any, layers: Sequence[tuple[Any, Mapping[str, Tensor]]]) -> Tensor | None:
        """Return what is added, from each layer's settings and tensors."""


class Allocation(Protocol):
    """Holds what training has learned of an adapter, and takes away what matters least."""

    def step(self, config: Any, layers: Sequence[Mapping[str, Tensor]], step: int) -> None:
        """Learn from the tensors' gradients, and take away what the schedule says of step ``step``."""
        ...


class Allocates(ABC):
    """Takes parts of an adapter away in training."""

    @abstractmethod
    def allocation(self, config: Any) -> Allocation | None:
        """Return a new allocation; ``None`` where the config asks for none."""


# -- asked of any method ---------------------------------------------------------------------------------------


def specialised(method: AnyMethod, config: Any) -> AnyMethod:
    """Return the method with the leaves that ``config`` gives to a layer."""
    return method.specialised(config) if isinstance(method, VariesWithConfig) else method


def settings_by_tensors(method: AnyMethod, settings: Any, tensors: Mapping[str, Tensor], base: BaseLayer) -> Any:
    """Return ``settings`` completed by a layer's tensors, where the method learns something from them."""
    return (
        method.settings_from_tensors(settings, tensors, base) if isinstance(method, SettledByCheckpoint) else settings
    )


def shared_names(method: Any) -> frozenset[str]:
    """Return the names of the tensors of a method, or of a prompt's, that belong to no layer."""
    return frozenset(leaf.name for leaf in method.shared) if isinstance(method, StoresShared) else frozenset()


def saved_tensors(method: AnyMethod, settings: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return what a checkpoint holds of a layer's tensors."""
    if not isinstance(method, ChangesWhenSaved):
        return tensors
    return {name: t for name, t in method.on_disk(settings, tensors).items() if method.leaf(name).saved}
