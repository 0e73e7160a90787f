"""Quotas: how many tokens the clients with each API key may embed in a minute."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emb_model_provider.errors import QuotaExceededError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PERIOD_S = 60.0
OTHERS = "*"
"""The key of the quota for keys that have none of their own."""


@dataclass(slots=True)
class _Bucket:
    """Tokens that are left. They can be negative, because a request is charged when its tokens are known."""

    tokens: float
    updated_at: float


class Quotas:
    """A token bucket for each named key, which holds the tokens of one minute. Used on the event loop.

    A request is accepted as long as tokens are left, and is charged when it is answered. One that takes more than what is
    left delays the next ones, so that the quota holds on average, and a request larger than the quota is possible.
    """

    def __init__(self, quotas: Mapping[str, int], clock: Callable[[], float] = time.monotonic) -> None:
        """Create full buckets for quotas in tokens per minute, by name of the key."""
        self._quotas = quotas
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def check(self, key_name: str) -> None:
        """Raise QuotaExceededError if the key has no tokens left."""
        quota = self._quota(key_name)
        if quota is None:
            return
        bucket = self._refilled(key_name, quota)
        if bucket.tokens <= 0:
            raise QuotaExceededError(
                f"The quota of the API key '{key_name}' of {quota} tokens per minute is used up. Try again later.",
                retry_after_s=(1 - bucket.tokens) * _PERIOD_S / quota,
            )

    def charge(self, key_name: str, tokens: int) -> None:
        """Subtract the tokens of an answered request."""
        quota = self._quota(key_name)
        if quota is not None and tokens:
            self._refilled(key_name, quota).tokens -= tokens

    def _quota(self, key_name: str) -> int | None:
        return self._quotas.get(key_name, self._quotas.get(OTHERS)) if key_name else None

    def _refilled(self, key_name: str, quota: int) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.setdefault(key_name, _Bucket(quota, now))
        bucket.tokens = min(quota, bucket.tokens + (now - bucket.updated_at) * quota / _PERIOD_S)
        bucket.updated_at = now
        return bucket
