"""One download: what is told of it, and what changes while it runs."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from emb_model_provider.choosing import resolve_source
from emb_model_provider.errors import ProviderError

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.hubs.base import HubName
    from emb_model_provider.model_spec import ModelSpec

JobState = Literal["queued", "running", "done", "failed", "cancelled"]
Phase = Literal["resolve", "download", "verify", "compile"]

_SPEED_OVER_S = 5.0
_SAMPLE_EVERY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A download as it was at one moment."""

    id: str
    state: JobState
    model_name: str
    source: HubName
    """The hub that is asked first, or, once it is done, the one that the files came from."""
    asked_revision: str | None
    revision: str | None
    """Resolved; None until it is known."""
    force: bool
    compile: bool
    precision: str | None
    """What it is compiled at; None where it is not."""
    phase: Phase | None
    """None before it begins; that in which it ended, once it has."""
    done_bytes: int
    total_bytes: int | None
    bytes_per_s: float | None
    """Over the last seconds, 0 where nothing comes; None while nothing is transferred."""
    cancelling: bool
    """It was cancelled, and is about to end."""
    error: str | None
    """Why it failed, and what to do."""
    failure: BaseException | None
    """The error whose words `error` has."""
    created: datetime
    started: datetime | None
    ended: datetime | None
    path: Path | None
    """The snapshot's directory, once it is there."""
    notes: tuple[str, ...]
    """What to know of how it was compiled."""

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


class Download:
    """A download that was asked for. What changes is read and written under the lock of `DownloadJobs`."""

    def __init__(self, spec: ModelSpec, *, force: bool, compiling: bool) -> None:
        self.id = secrets.token_hex(6)
        self.spec = spec
        self.force = force
        self.compiling = compiling
        self.cancelled = threading.Event()
        self.thread: threading.Thread | None = None
        self.state: JobState = "queued"
        self.source = resolve_source(spec)
        self.revision: str | None = None
        self.phase: Phase | None = None
        self.done_bytes = 0
        self.total_bytes: int | None = None
        self.failure: BaseException | None = None
        self.created = now_utc()
        self.started: datetime | None = None
        self.ended: datetime | None = None
        self.path: Path | None = None
        self.notes: tuple[str, ...] = ()
        self._samples: deque[tuple[float, int]] = deque()
        """Moments, monotonic, and the bytes that were there."""
        self._moved_at = 0.0

    @property
    def is_over(self) -> bool:
        return self.ended is not None

    def does_the_same_as(self, other: Download) -> bool:
        """Whether this job, which is on its way, makes another one unnecessary."""
        if self.is_over or self.cancelled.is_set() or other.force > self.force:
            return False
        mine, others = self.spec, other.spec
        same_files = (self.source, mine.name, mine.path, mine.revision, mine.endpoint, mine.cache_dir) == (
            other.source, others.name, others.path, others.revision, others.endpoint, others.cache_dir,
        )  # fmt: skip
        if not self.compiling or not other.compiling:
            return same_files and self.compiling == other.compiling
        return replace(mine, alias="", token=None) == replace(others, alias="", token=None)

    def note(self, phase: Phase, done_bytes: int, total_bytes: int | None) -> None:
        now = time.monotonic()
        if phase != self.phase:
            self._samples.clear()
        if not self._samples or done_bytes != self.done_bytes:
            self._moved_at = now
        self.phase, self.done_bytes, self.total_bytes = phase, done_bytes, total_bytes
        if not self._samples or now - self._samples[-1][0] >= _SAMPLE_EVERY_S:
            self._samples.append((now, done_bytes))
        self._forget_old_samples(now)

    def view(self) -> Job:
        return Job(
            id=self.id,
            state=self.state,
            model_name=self.spec.name,
            source=self.source,
            asked_revision=self.spec.revision,
            revision=self.revision,
            force=self.force,
            compile=self.compiling,
            precision=self.spec.precision if self.compiling else None,
            phase=self.phase,
            done_bytes=self.done_bytes,
            total_bytes=self.total_bytes,
            bytes_per_s=self._speed(),
            cancelling=self.cancelled.is_set() and not self.is_over,
            error=_words(self.failure) if self.failure is not None else None,
            failure=self.failure,
            created=self.created,
            started=self.started,
            ended=self.ended,
            path=self.path,
            notes=self.notes,
        )

    def _speed(self) -> float | None:
        if self.state != "running" or self.phase not in ("download", "verify"):
            return None
        now = time.monotonic()
        if now - self._moved_at >= _SPEED_OVER_S:
            return 0.0
        self._forget_old_samples(now)
        since, done_bytes = self._samples[0]
        return max(0.0, (self.done_bytes - done_bytes) / max(now - since, _SAMPLE_EVERY_S))

    def _forget_old_samples(self, now: float) -> None:
        while len(self._samples) > 1 and self._samples[1][0] <= now - _SPEED_OVER_S:
            self._samples.popleft()


def now_utc() -> datetime:
    return datetime.now(UTC)


def _words(error: BaseException) -> str:
    if isinstance(error, ProviderError):
        return error.message
    details = str(error).splitlines()[0] if str(error) else "no details"
    return f"{type(error).__name__}: {details}"
