"""Remembers which versions a name may have had at each moment, as far as the clients of a server can know."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf

# The versions that a server keeps of a name.
_KEPT = 8
# A server notes within these seconds that a request is over, or that its client is gone.
_SLACK = 5.0


@dataclass
class Span:
    """A time in which something holds.

    Attributes:
        value: what holds.
        since, until: the time.
    """

    value: str | None
    since: float = -inf
    until: float = inf

    def meets(self, began: float, ended: float) -> bool:
        """Tell whether it holds at some moment of another time."""
        return self.since <= ended and began <= self.until


@dataclass
class NameHistory:
    """The versions of a name; a change takes effect at some moment between its request and its answer.

    Attributes:
        versions: the digests that the name can be moved to, the oldest first.
        current: the digest that requests get; ``None`` while the name is not registered.
        changing: held by the one change that goes on.
    """

    versions: list[str] = field(default_factory=list)
    current: str | None = None
    changing: threading.Lock = field(default_factory=threading.Lock)
    _pointing: list[Span] = field(default_factory=list)
    _known: list[Span] = field(default_factory=list)
    _forced: list[Span] = field(default_factory=list)
    _uses: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pointing.append(Span(self.current))
        self._known += map(Span, self.versions)

    def registered(self, digest: str, began: float, ended: float) -> None:
        """Note that the name has a version, new or its own, as its current one."""
        if digest == self.current:
            return
        others = [version for version in self.versions if version != digest]
        self._set([*others[max(0, len(others) - _KEPT + 1) :], digest], digest, began, ended)

    def rolled_back(self, digest: str, began: float, ended: float) -> None:
        """Note that the name has an earlier version as its current one."""
        self._set(self.versions, digest, began, ended)

    def removed(self, began: float, ended: float, forced: bool) -> None:
        """Note that the name is gone, and that its answers were ended."""
        self._set([], None, began, ended)
        if forced:
            self._forced.append(Span(None, began, ended))

    @contextmanager
    def used(self) -> Iterator[None]:
        """Note that a request uses the name while the block runs."""
        span = Span(None, time.monotonic())
        self._uses.append(span)
        try:
            yield
        finally:
            span.until = time.monotonic() + _SLACK

    @property
    def previous(self) -> str | None:
        """The version that a roll back without further words leads to."""
        earlier = self.versions[: self.versions.index(self.current)] if self.current else []
        return earlier[-1] if earlier else None

    def _set(self, versions: list[str], current: str | None, began: float, ended: float) -> None:
        for span in self._known:
            if span.until == inf and span.value not in versions:
                span.until = began
        known = {span.value for span in self._known if span.until == inf}
        self._known += [Span(version, ended) for version in versions if version not in known]
        self._pointing[-1].until = ended
        self._pointing.append(Span(current, began))
        self.versions, self.current = versions, current

    # -- what an answer may be -----------------------------------------------------------------------------

    def might_be(self, digest: str | None, began: float, ended: float) -> bool:
        """Tell whether the name may have pointed to a version within a time; ``None`` is no version at all."""
        return any(span.value == digest and span.meets(began, ended) for span in self._pointing)

    def might_lack(self, digest: str, began: float, ended: float) -> bool:
        """Tell whether the name may have been without a version within a time."""
        return not any(span.value == digest and span.since < began and ended < span.until for span in self._known)

    def might_be_ended(self, began: float, ended: float) -> bool:
        """Tell whether answers may have been ended by force within a time."""
        return any(span.meets(began, ended) for span in self._forced)

    def might_be_used(self, began: float, ended: float) -> bool:
        """Tell whether requests may have used the name within a time."""
        return any(span.meets(began, ended) for span in self._uses)
