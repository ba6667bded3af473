"""Holds keys to their requests and tokens a minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from veneer.serving.auth import Caller
from veneer.serving.serving_errors import RateLimitedError

_MINUTE = 60.0


@dataclass
class _Bucket:
    """What a key may still take; it fills up within a minute."""

    left: float
    moment: float

    def fill(self, limit: float, now: float) -> None:
        self.left = min(limit, self.left + (now - self.moment) * limit / _MINUTE)
        self.moment = now


class RateLimits:
    """Holds a bucket of requests and one of tokens for each key that has limits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def charge(self, caller: Caller, tokens: int) -> None:
        """Take a request and its tokens from what a key may have.

        Raises:
            RateLimitedError: it had too much already; nothing is taken.
        """
        charges = {"requests": (caller.requests_per_minute, 1), "tokens": (caller.tokens_per_minute, tokens)}
        taken = [
            (self._bucket(caller, what, limit, amount), amount)
            for what, (limit, amount) in charges.items()
            if limit is not None
        ]
        for bucket, amount in taken:
            bucket.left -= amount

    def refund(self, caller: Caller, tokens: int) -> None:
        """Give back tokens that a request did not need."""
        bucket = self._buckets.get((caller.id, "tokens"))
        if bucket is not None:
            bucket.left += tokens

    def _bucket(self, caller: Caller, what: str, limit: float, amount: float) -> _Bucket:
        bucket = self._buckets.setdefault((caller.id, what), _Bucket(limit, self._clock()))
        bucket.fill(limit, self._clock())
        if amount > limit:
            raise RateLimitedError(
                f"The request takes {amount:g} {what}, and the key {caller.id} has {limit:g} a minute.",
                hint="Ask for fewer tokens.",
            )
        if amount > bucket.left:
            raise RateLimitedError(
                f"The key {caller.id} has used up its {limit:g} {what} a minute.",
                hint="Wait, and ask again.",
                retry_after=(amount - bucket.left) * _MINUTE / limit,
            )
        return bucket
