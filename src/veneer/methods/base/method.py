"""The abstract class of methods: a method names its tensors, makes them, and lowers them to a patch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from veneer.base_model.sites.site import Site, unsupported
from veneer.configs.base import TargetedConfig
from veneer.files.tensor_keys import PREFIX
from veneer.patches.patch import Patch

ConfigT = TypeVar("ConfigT", bound=TargetedConfig)
SettingsT = TypeVar("SettingsT")


@dataclass(frozen=True)
class Leaf:
    """Names one tensor of a method, and says how it is trained, saved and loaded.

    Attributes:
        name: its name in a checkpoint, behind its layer's.
        trained: whether training changes it.
        saved: whether a checkpoint holds it; one that it does not hold is worked out again when it is loaded.
        loaded: whether it is read from a checkpoint; peft writes some that say nothing.
        moves_bias: whether it moves a layer's output as a bias does, even where the layer has none.
        integer: whether it holds whole numbers, such as the places of values.
        buffer: whether it is a buffer of its module, and no parameter; by default where training never changes it.
        memory_name: its name in memory, where the adapter's name follows its first part, or its last where it ends
            with a dot; by default its name.
    """

    name: str
    _: KW_ONLY
    trained: bool = True
    saved: bool = True
    loaded: bool = True
    moves_bias: bool = False
    integer: bool = False
    buffer: bool | None = None
    memory_name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "buffer", not self.trained if self.buffer is None else self.buffer)
        object.__setattr__(self, "memory_name", self.memory_name or self.name)


def around_adapter(memory_name: str) -> tuple[str, str]:
    """Return the parts of a tensor's name in memory before and after the adapter's name."""
    if memory_name.endswith("."):
        return memory_name[:-1], ""
    head, _, tail = memory_name.partition(".")
    return head, tail


class BaseLayer(Protocol):
    """Gives one base layer as it was before any adapter: live, or on disk."""

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
    """Pairs a method with the layers that a config gives to it.

    Attributes:
        method: lowers the tensors.
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
    """Describes a layer that a new adapter gets tensors for, and draws their first values.

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

    def normal(self, shape: Sequence[int], std: float = 1.0) -> Tensor:
        """Return normal values around zero, float32."""
        return torch.empty(tuple(shape)).normal_(std=std, generator=self.generator)

    def uniform(self, shape: Sequence[int], bound: float) -> Tensor:
        """Return uniform values from ``-bound`` to ``bound``, float32."""
        return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=self.generator)

    def kaiming(self, shapes: Mapping[str, Sequence[int]], zero: Collection[str] = ()) -> dict[str, Tensor]:
        """Return tensors of given shapes: Kaiming-uniform (He et al. 2015), those in ``zero`` zero."""
        tensors = {name: torch.zeros(tuple(shape)) for name, shape in shapes.items()}
        for name, tensor in tensors.items():
            if name not in zero:
                torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=self.generator)
        return tensors


class Method(ABC, Generic[ConfigT, SettingsT]):
    """Lowers the tensors of an adapter to patches. Stateless: tensors live in the layers, options in the config.

    Attributes:
        leaves: the tensors that an adapted layer may have.
        kinds: the kinds of layer that it can adapt.
        prefix: the beginning of the checkpoint key of a module that is saved whole.
    """

    leaves: tuple[Leaf, ...]
    kinds: ClassVar[tuple[type[Site], ...]] = (Site,)
    prefix: ClassVar[str] = PREFIX

    @cached_property
    def by_name(self) -> Mapping[str, Leaf]:
        """The leaves by their names."""
        return {leaf.name: leaf for leaf in self.leaves}

    @cached_property
    def disk_names(self) -> tuple[str, ...]:
        """The names of the leaves that are read from a checkpoint."""
        return tuple(leaf.name for leaf in self.leaves if leaf.saved and leaf.loaded)

    def leaf(self, name: str) -> Leaf:
        """Return the leaf of a name."""
        return self.by_name[name]

    def check_site(self, site: Site) -> None:
        """Raise ``UnsupportedError`` unless the method can adapt this kind of layer."""
        if not isinstance(site, self.kinds):
            raise unsupported(site, type(self).__name__)

    @abstractmethod
    def settings(self, config: ConfigT, site: Site) -> SettingsT:
        """Return what ``config`` says for a layer, its patterns resolved; asked once a layer."""

    @abstractmethod
    def shapes(self, settings: SettingsT, site: Site) -> Mapping[str, tuple[int, ...]]:
        """Return the name of each tensor that a layer has, and the shape that it must have."""

    @abstractmethod
    def init(self, new: NewLayer[ConfigT, SettingsT]) -> dict[str, Tensor]:
        """Return the tensors, by name and in float32, that a new adapter starts from on a layer."""

    @abstractmethod
    def lower(self, settings: SettingsT, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        """Return what the tensors mean for the layer. Pure and differentiable."""


class UniformMethod(Method[ConfigT, ConfigT]):
    """Takes the config itself for the settings of every layer."""

    def settings(self, config: ConfigT, site: Site) -> ConfigT:
        return config


AnyMethod = Method[Any, Any]


def leaves_of(parts: Iterable[MethodOnSites]) -> dict[str, MethodOnSites]:
    """Return the part that each name of a leaf belongs to, the longest name first."""
    by_name = {leaf: part for part in parts for leaf in part.method.disk_names}
    return dict(sorted(by_name.items(), key=lambda item: -len(item[0])))
