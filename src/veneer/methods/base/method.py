"""What a method is: how its tensors are named, made, and lowered to a patch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from veneer.base_model.sites.site import Site, unsupported
from veneer.configs.base import TargetedConfig
from veneer.files.tensor_keys import PREFIX
from veneer.methods.base.leaf import Leaf
from veneer.patches.patch import Patch

if TYPE_CHECKING:
    from veneer.base_model.catalog import Catalog


ConfigT = TypeVar("ConfigT", bound=TargetedConfig)
SettingsT = TypeVar("SettingsT")


class BaseLayer(Protocol):
    """One base layer as it was before any adapter: live, or on disk."""

    @property
    def site(self) -> Site:
        """Its kind, name and shape."""
        ...

    @property
    def base_bias(self) -> Tensor | None:
        """Its bias, shape ``(out,)``."""
        ...

    def base_weight(self) -> Tensor:
        """Its weight, canonical ``(out, in)``, in its own dtype, without gradients."""
        ...


@dataclass
class MethodOnSites:
    """One method and the layers that a config gives to it.

    Attributes:
        method: the method.
        sites: the layers, in the model's order.
        twins: id of a site -> others that use the same tensors, such as a tied output layer.
        optional: whether a checkpoint may leave the layers out.
        companions: whether biases, and embeddings saved whole, come along with it: see :func:`~.parts.parts_of`.
    """

    method: AnyMethod
    sites: list[Site]
    twins: dict[str, list[Site]] = field(default_factory=dict)
    optional: bool = False
    companions: bool = False

    @property
    def everywhere(self) -> list[Site]:
        """The layers, and those that use their tensors."""
        return [*self.sites, *(twin for twins in self.twins.values() for twin in twins)]


@dataclass(frozen=True)
class NewLayer(Generic[ConfigT, SettingsT]):
    """A layer that a new adapter gets tensors for.

    Attributes:
        config: the adapter's.
        settings: the config's meaning for the layer.
        base: the layer.
        generator: of what is drawn at random; torch's own when ``None``.
    """

    config: ConfigT
    settings: SettingsT
    base: BaseLayer
    generator: torch.Generator | None = None

    @property
    def site(self) -> Site:
        """The layer's kind, name and shape."""
        return self.base.site


class Method(ABC, Generic[ConfigT, SettingsT]):
    """One PEFT method. Stateless: its tensors live in the layers, its options in the config.

    Attributes:
        leaves: the tensors that an adapted layer may have.
        kinds: the kinds of layer that it can adapt.
        saves_twins: whether a layer that uses another's tensors has them in a checkpoint again.
        twins_repeat: whether tensors of such a layer in a checkpoint are those again; else they are its own.
        shared: tensors that all layers of an adapter use, ``base_model.<leaf>`` on disk; they join the layer's own in
            what :meth:`lower` gets. ``"v"`` also means ``v.0``, ``v.1`` ...
        prefix: what begins the checkpoint key of a module that is saved whole.
        alone: whether two adapters that have it on layers cannot be active together.
    """

    leaves: tuple[Leaf, ...]
    kinds: ClassVar[tuple[type[Site], ...]] = (Site,)
    saves_twins: ClassVar[bool] = False
    twins_repeat: ClassVar[bool] = True
    shared: ClassVar[tuple[Leaf, ...]] = ()
    prefix: ClassVar[str] = PREFIX
    alone: ClassVar[bool] = False

    def shared_shapes(self, config: ConfigT, sites: Sequence[Site]) -> Mapping[str, tuple[int, ...]]:
        """Shared leaf -> the shape it must have."""
        return {}

    def make_shared(
        self, config: ConfigT, bases: Sequence[BaseLayer], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Shared leaf -> its float32 tensor, for a new adapter or where a checkpoint leaves it out."""
        return {}

    def saves_shared(self, config: ConfigT) -> bool:
        """Whether the shared tensors are written to a checkpoint; without them they can be made from the config."""
        return True

    def trains_shared_leaf(self, config: ConfigT, leaf: str) -> bool:
        """Tell whether a shared tensor is trained; by default as :attr:`shared` says."""
        return any(shared.trained for shared in self.shared if shared.name == leaf.partition(".")[0])

    @cached_property
    def by_name(self) -> Mapping[str, Leaf]:
        """Name -> leaf of a layer."""
        return {leaf.name: leaf for leaf in self.leaves}

    @cached_property
    def disk_names(self) -> tuple[str, ...]:
        """The names of the leaves that are read from a checkpoint."""
        return tuple(leaf.name for leaf in self.leaves if leaf.saved and leaf.loaded)

    def leaf(self, name: str) -> Leaf:
        """Return the leaf of a name."""
        return self.by_name[name]

    def complete(self, config: ConfigT, catalog: Catalog) -> None:
        """Fill in which layers a new adapter has, where ``config`` leaves it open and the method knows."""

    def beside(
        self, config: ConfigT, bases: Sequence[BaseLayer], shared: Mapping[str, Tensor]
    ) -> Sequence[Mapping[str, Tensor]]:
        """What joins each layer's own tensors in what :meth:`lower` gets: by default the shared ones.

        A method adds what config and base tell and the checkpoint need not hold; it is frozen. A leaf that a new
        adapter must have and :meth:`init` does not make is taken from here.
        """
        return [shared] * len(bases)

    def tied(self, config: ConfigT, sites: Sequence[Site]) -> Mapping[str, Sequence[int]]:
        """Leaf -> for each layer, the index of the one whose tensor it uses; none are shared so by default.

        A checkpoint holds them once for each layer; in memory they are one.
        """
        return {}

    def joined(self, embedding: SettingsT, output: SettingsT) -> SettingsT | None:
        """The settings of an output layer that uses the tensors of the embedding whose weight it shares.

        ``None`` where the two cannot be changed alike, which is so for a method that does not say how.
        """
        return None

    def for_config(self, config: ConfigT) -> AnyMethod:
        """The method with the leaves that ``config`` gives to a layer; itself where all configs give the same."""
        return self

    def parts(self, config: ConfigT, catalog: Catalog) -> list[MethodOnSites]:
        """The layers that ``config`` means, and for each the methods that serve it; :meth:`for_config` for all."""
        return [MethodOnSites(self.for_config(config), catalog.sites(config), companions=True)]

    def check_site(self, site: Site) -> None:
        """Raise ``UnsupportedError`` unless the method can adapt this kind of layer."""
        if not isinstance(site, self.kinds):
            raise unsupported(site, type(self).__name__)

    def changes_unless_zero(self, settings: SettingsT) -> bool:
        """Whether it changes any layer of which no tensor is all zero; where not, :meth:`lower` has to tell."""
        return False

    @abstractmethod
    def settings(self, config: ConfigT, site: Site) -> SettingsT:
        """What ``config`` means for a layer, its patterns resolved; worked out once a layer."""

    def twinned(self, settings: SettingsT, twin: Site) -> SettingsT | None:
        """What a layer's ``settings`` mean for another that uses the same tensors; ``None`` where nothing."""
        return settings

    def fitted(self, settings: SettingsT, stored: Mapping[str, tuple[int, ...]], site: Site) -> SettingsT:
        """``settings`` with what only the shapes in a checkpoint (leaf -> shape) tell."""
        return settings

    def readings(self, settings: SettingsT, config: ConfigT) -> Sequence[SettingsT]:
        """Other ``settings`` for a layer, which some checkpoints with the same config were made with."""
        return ()

    def settled(self, settings: SettingsT, tensors: Mapping[str, Tensor], base: BaseLayer) -> SettingsT:
        """``settings`` completed with what only a loaded checkpoint's tensors tell."""
        return settings

    def restored(self, config: ConfigT, settings: SettingsT, base: Callable[[], BaseLayer]) -> dict[str, Tensor]:
        """The tensors of a loaded layer that no checkpoint holds; none by default."""
        return {}

    def on_disk(self, settings: SettingsT, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What of a layer's tensors is saved: themselves by default."""
        return tensors

    def config_on_disk(self, config: ConfigT) -> ConfigT:
        """The config that goes with :meth:`on_disk` of an adapter with tensors that no checkpoint holds."""
        return config

    def invocation(self, config: ConfigT) -> tuple[int, ...]:
        """The tokens from which on the adapter acts; empty where it acts on all."""
        return ()

    def check_mergeable(self, settings: SettingsT, site: Site) -> None:
        """Raise ``MergeError`` where the method has no merged form; asked of all layers before any is merged."""

    @abstractmethod
    def shapes(self, settings: SettingsT, site: Site) -> Mapping[str, tuple[int, ...]]:
        """Leaf -> the shape it must have on a layer."""

    @abstractmethod
    def init(self, new: NewLayer[ConfigT, SettingsT]) -> dict[str, Tensor]:
        """Leaf -> the float32 tensor that a new adapter starts from."""

    @abstractmethod
    def lower(self, settings: SettingsT, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        """What the tensors mean for the layer. Pure and differentiable."""

    def penalty(self, config: ConfigT, layers: Sequence[tuple[SettingsT, Mapping[str, Tensor]]]) -> Tensor | None:
        """What training adds to the model's loss, for each layer's settings and tensors; nothing by default."""
        return None


AnyMethod = Method[Any, Any]


def leaves_of(parts: Iterable[MethodOnSites]) -> dict[str, MethodOnSites]:
    """Leaf -> the part whose it is, the longest leaf first."""
    found = {leaf: part for part in parts for leaf in part.method.disk_names}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))
