"""The layouts of a batch's rows in a model's layers, as far as they were found out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from veneer.patches.row_layout import Layout
from veneer.patches.selection import Selection


class Demands(NamedTuple):
    """The demands of a call on its adapters' layers.

    Attributes:
        names: the adapters.
        mixed: True where its rows differ in their adapters.
        by_row: True where it names an adapter for each row.
        tasks: True where it names the rows' tasks.
    """

    names: tuple[str, ...]
    mixed: bool
    by_row: bool
    tasks: bool

    @classmethod
    def of(cls, selection: Selection) -> Demands:
        """Return the demands of a call with this selection on all its adapters' layers."""
        return cls(selection.applied, selection.is_mixed, selection.rows is not None, selection.task_ids is not None)


class HasLayout(Protocol):
    """A module whose input holds the rows of a batch in some layout."""

    layout: Layout


@dataclass(frozen=True)
class Readiness:
    """Tells whether the layers of adapters meet the demands of a call.

    Attributes:
        unfit: the first layer that cannot meet them.
        unreached: True where no pass has reached some of the layers yet.
        images: True where one of them sees images.
        media: the arguments for images and sound of the calls that were looked at.
    """

    unfit: str | None
    unreached: bool
    images: bool
    media: frozenset[str]


@dataclass
class Layouts:
    """Holds what is known of the layers of one model.

    Attributes:
        known: a layer's name -> its layout; ``UNKNOWN`` for one that follows no rule.
        attempted: the layers that a pass over random tokens has not reached.
        ready: demands on an adapter's layers -> the answer.
    """

    known: dict[str, Layout] = field(default_factory=dict)
    attempted: set[str] = field(default_factory=set)
    ready: dict[Demands, Readiness] = field(default_factory=dict)

    def give_to(self, wrappers: Iterable[tuple[str, HasLayout]]) -> None:
        """Let new wrappers, given with their names, have the layouts that are known."""
        for name, wrapper in wrappers if self.known else ():
            wrapper.layout = self.known.get(name, wrapper.layout)

    def forget(self, adapter: str) -> None:
        """Forget the answers for an adapter, whose name may become another's."""
        self.ready = {demands: answer for demands, answer in self.ready.items() if adapter not in demands.names}
