"""Defines what a format is: it recognises its files, reads them, and writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from veneer.files.source import Source
from veneer.formats.canonical import CanonicalAdapter

if TYPE_CHECKING:
    from veneer.base_model.catalog import Catalog


@dataclass(frozen=True)
class Base:
    """The base of an adapter, as far as a format needs it.

    Attributes:
        origin: its path or hub id, for errors.
        config: its ``config.json``; empty where it has none.
        shapes: the path of each parameter, as the model in memory names it -> shape.
        tied: the pairs of parameters that are one (``lm_head.weight`` -> ``model.embed_tokens.weight``).
        components: the models of a pipeline of diffusers by their folders' names: ``unet``, ``transformer``,
            ``text_encoder`` ...; empty for a model alone. A pipeline has no shapes of its own.
        catalog: returns its modules; ``None`` where it is not built as a model, as its config says all of it.
    """

    origin: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str] = field(default_factory=dict)
    components: Mapping[str, Base] = field(default_factory=dict)
    catalog: Callable[[], Catalog] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class ReadOptions:
    """What a user says about a file that does not say it itself.

    Attributes:
        base: the base, where one is given or found.
        experts: ``"grouped"`` or ``"rank-major"``: the order of the columns of ``lora_B`` of fused experts.
        component: the part of a pipeline that is wanted: ``unet``, ``transformer``, ``text_encoder`` ...
        scaling: ``"plain"`` or ``"alpha/rank"``: what a file's alpha meant to the version of MLX that trained it.
    """

    base: Base | None = None
    experts: str | None = None
    component: str | None = None
    scaling: str | None = None


@dataclass(frozen=True)
class Step:
    """What converting did to some modules, for the report.

    Attributes:
        kind: ``"exact"``, ``"folded"``, ``"padded"`` or ``"approximated"``.
        what: what was done, in a few words: "the scale went into B".
        modules: the paths.
        error: the relative error that it left; 0.0 for what is exact.
    """

    kind: str
    what: str
    modules: tuple[str, ...]
    error: float = 0.0


class Format(Protocol):
    """A format of adapter files. ``ALL`` in :mod:`veneer.formats.registry` has one of each.

    Attributes:
        name: as ``--to`` has it.
        title: as people call it: "MLX-LM".
        reads: True if it can be read.
        writes: True if it can be written.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reads: ClassVar[bool]
    writes: ClassVar[bool]

    def recognise(self, source: Source) -> bool:
        """Tell by file names, first bytes and tensor keys whether a source is of this format; imports no torch."""

    def read(self, source: Source, options: ReadOptions) -> Mapping[str, CanonicalAdapter]:
        """Read it: component of a pipeline -> adapter; one under ``""`` where there are no components.

        Raises:
            SourceError, BindError: a file is damaged, incomplete or holds what it should not. BaseModelError: a base is
            needed. UsageError: an option must decide.
        """

    def write(self, adapters: Mapping[str, CanonicalAdapter], target: Path, base: Base | None) -> list[Step]:
        """Write adapters to a folder or file that does not exist; return what was done to them.

        Raises:
            UnsupportedError: the format cannot hold them. BaseModelError: a base is needed. OutputError: it cannot be
            written; nothing is left behind.
        """
