"""What has been found out of how a model's layers see the rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from veneer.patches.row_layout import Layout
from veneer.patches.selection import Selection


class Asked(NamedTuple):
    """What a call asks of its adapters' layers.

    Attributes:
        names: the adapters.
        mixed: whether its rows differ in their adapters.
        by_row: whether it names one for each row.
        tasks: whether it names the rows' tasks.
    """

    names: tuple[str, ...]
    mixed: bool
    by_row: bool
    tasks: bool

    @classmethod
    def of(cls, selection: Selection) -> Asked:
        """Return what a call with this selection asks of all its adapters' layers."""
        return cls(selection.applied, selection.is_mixed, selection.rows is not None, selection.task_ids is not None)


@dataclass(frozen=True)
class Readiness:
    """What is known of the layers that are asked for.

    Attributes:
        unfit: the first layer that cannot do what is asked.
        unreached: whether no pass has reached some of the layers yet.
        images: whether one of them sees images.
        media: the arguments for images and sound of the calls that were looked at.
    """

    unfit: str | None
    unreached: bool
    images: bool
    media: frozenset[str]


@dataclass
class Layouts:
    """What is known of the layers of one model.

    Attributes:
        known: a layer's name -> its layout; ``UNKNOWN`` for one that follows no rule.
        attempted: the layers that a pass over random tokens has not reached.
        ready: what has been asked of an adapter before -> what was known then; to be emptied when one comes, goes or is
            renamed.
    """

    known: dict[str, Layout] = field(default_factory=dict)
    attempted: set[str] = field(default_factory=set)
    ready: dict[Asked, Readiness] = field(default_factory=dict)
