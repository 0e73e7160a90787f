"""Quotas: how many tokens the clients with each API key may embed in a minute."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emb_model_provider.errors import QuotaExceededError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from emb_model_provider.workers import SharedMemory

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

    def __init__(
        self,
        quotas: Mapping[str, int],
        clock: Callable[[], float] = time.monotonic,
        *,
        shared: SharedMemory | None = None,
        names: Sequence[str] = (),
    ) -> None:
        """Create full buckets for quotas in tokens per minute, by name of the key.

        Of several workers each can get the requests of a key, so that its bucket is in their shared memory, at the position of
        its name in `names`.
        """
        self._quotas = quotas
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}
        self._shared = shared
        self._positions = {name: position for position, name in enumerate(names)}

    def check(self, key_name: str) -> None:
        """Raise QuotaExceededError if the key has no tokens left."""
        quota = self._quota(key_name)
        if quota is None:
            return
        with self._refilled(key_name, quota) as bucket:
            tokens = bucket.tokens
        if tokens <= 0:
            raise QuotaExceededError(
                f"The quota of the API key '{key_name}' of {quota} tokens per minute is used up. Try again later.",
                retry_after_s=(1 - tokens) * _PERIOD_S / quota,
            )

    def charge(self, key_name: str, tokens: int) -> None:
        """Subtract the tokens of an answered request."""
        quota = self._quota(key_name)
        if quota is not None and tokens:
            with self._refilled(key_name, quota) as bucket:
                bucket.tokens -= tokens

    def _quota(self, key_name: str) -> int | None:
        return self._quotas.get(key_name, self._quotas.get(OTHERS)) if key_name else None

    @contextmanager
    def _refilled(self, key_name: str, quota: int) -> Iterator[_Bucket]:
        """Yield the bucket of a key, with the tokens of the time since its last use. Changes are kept."""
        if self._shared is None:
            bucket = self._buckets.setdefault(key_name, _Bucket(quota, self._clock()))
            self._refill(bucket, quota)
            yield bucket
            return
        with self._shared.bucket(self._positions[key_name]) as (tokens, updated_at, view):
            bucket = _Bucket(quota, self._clock()) if math.isnan(updated_at) else _Bucket(tokens, updated_at)
            self._refill(bucket, quota)
            yield bucket
            view[0], view[1] = bucket.tokens, bucket.updated_at

    def _refill(self, bucket: _Bucket, quota: int) -> None:
        now = self._clock()
        bucket.tokens = min(quota, bucket.tokens + (now - bucket.updated_at) * quota / _PERIOD_S)
        bucket.updated_at = now
