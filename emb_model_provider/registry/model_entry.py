"""What the registry keeps of each model: its name, its state, its stay in memory, and what is said of it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emb_model_provider.backends.base import ModelDescription
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.serving.engine import Engine
    from emb_model_provider.snapshots.locks import FileLock
    from emb_model_provider.snapshots.snapshot import Snapshot


class State(StrEnum):
    """Where a model is on its way from a name to an engine."""

    UNLOADED = "unloaded"
    DOWNLOADING = "downloading"
    COMPILING = "compiling"
    LOADING = "loading"
    READY = "ready"
    HUNG = "hung"
    FAILED = "failed"
    UNLOADING = "unloading"


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A served model as it is now. Moments are Unix time in seconds; None is never, or not now."""

    spec: ModelSpec
    state: State
    preload: bool
    created: int
    """When the model was loaded here, or when the service started."""
    error: str | None
    """Why it failed, hangs, is loaded anew, or is still not loaded, in one line."""
    restarts: int
    """How often it broke down and was loaded anew."""
    snapshot: Snapshot | None
    description: ModelDescription | None
    waiting_inputs: int
    waiting_tokens: int
    configured: bool = True
    """Whether it is in the settings; else it was added at run time."""
    loaded_at: float | None = None
    last_used: float | None = None
    """When a request to it last ended."""
    requests_served: int = 0
    requests_per_s: float = 0.0
    """Over the last 60 seconds."""
    p95_s: float | None = None
    """What 95 % of the requests of the last 60 seconds took at most, in seconds, once the model was there."""
    memory_bytes: int | None = None
    """What it takes in memory while it is there; see `backends.memory`."""
    unload_reason: str | None = None
    """Why it was taken out of memory, until it is back there."""
    unloads: Mapping[str, int] = field(default_factory=dict)
    """How often it was taken out of memory, by the reason."""

    @property
    def is_available(self) -> bool:
        """Whether a request is answered: at once, or after a load that went well before."""
        if self.state in (State.FAILED, State.HUNG):
            return False
        return self.state is State.READY or (self.unload_reason is not None and self.error is None)


class LoadedModel:
    """One stay of a model in memory, from the beginning of its loading to its end.

    Who waits for the load is a user of it already: else a model could be unloaded again, for others, before those
    that it was loaded for had their turn.
    """

    __slots__ = (
        "_empty", "engine", "entry", "expected_bytes", "hold", "loading", "ref_count", "since", "step_started_at", "waiting_for",
    )  # fmt: skip

    def __init__(self, entry: ModelEntry) -> None:
        self.entry = entry
        self.engine: Engine | None = None
        self.loading: asyncio.Task[None]
        self.hold: FileLock | None = None
        """Keeps the snapshot on the disk: a model that breaks down is loaded from it anew."""
        self.ref_count = 0
        """Requests that run on it, or wait for it."""
        self.since = time.monotonic()
        """When it was begun; when it could answer, from then on."""
        self.expected_bytes = 0
        self.waiting_for = ""
        """What has to happen before there is room for it, for people."""
        self.step_started_at: float | None = None
        """When it began to wait for room, or, from then on, was let in; None before."""
        self._empty: asyncio.Event | None = None

    @property
    def memory_bytes(self) -> int:
        """What it takes in memory; while it is loaded, what is known or expected of that."""
        return self.engine.memory_bytes if self.engine is not None else self.expected_bytes

    def slow_load_warning(self) -> str:
        """Return what to say where its load takes suspiciously long; empty where it does not."""
        if self.engine is not None or self.step_started_at is None:
            return ""
        took_s = time.monotonic() - self.step_started_at
        if took_s < self.entry.slow_load_s:
            return ""
        if self.waiting_for:
            return f"It has waited for room in memory for {took_s:.0f} s: {self.waiting_for}."
        return (
            f"It has been loading for {took_s:.0f} s, and keeps its room in memory. Nothing can end a load: if this one "
            "does not come to its end, start the service again."
        )

    @property
    def last_used_at(self) -> float:
        """When it was last of use to anybody, `time.monotonic()`."""
        return max(self.since, self.entry.stats.last or 0.0)

    def release_ref(self) -> None:
        """Count a user out."""
        self.ref_count -= 1
        if not self.ref_count and self._empty is not None:
            self._empty.set()

    async def wait_idle(self) -> None:
        """Wait until there is no user. Only the one that unloads it waits, when no new ones come in."""
        if self.ref_count:
            self._empty = asyncio.Event()
            await self._empty.wait()

    def release_snapshot(self) -> None:
        """Let the snapshot go. Calling it again does nothing."""
        if self.hold is not None:
            self.hold.release()


class ModelEntry:
    """A model that is served, in memory or not."""

    def __init__(self, spec: ModelSpec, *, preload: bool, configured: bool, slow_load_s: float) -> None:
        self.spec = spec
        self.slow_load_s = slow_load_s
        """After which a load that has not ended is reported, in seconds."""
        self.preload = preload
        self.configured = configured
        self.created = int(time.time())
        self.state = State.UNLOADED
        self.loaded_model: LoadedModel | None = None
        """The stay that new requests join."""
        self.unloading: asyncio.Task[None] | None = None
        self.snapshot: Snapshot | None = None
        self.measured_bytes: int | None = None
        """What it took in memory last time."""
        self.error: str | None = None
        self.failed_at = 0.0
        self.restarts = 0
        self.loaded_at: float | None = None
        self.unload_reason: str | None = None
        self.unloads: Counter[str] = Counter()
        self.removed = False
        self.stats = RequestStats()

    @property
    def engine(self) -> Engine | None:
        return self.loaded_model.engine if self.loaded_model is not None else None

    @property
    def blocked_by(self) -> str:
        """What its load waits for before it begins, to be added to a sentence; empty where that is nothing."""
        waiting_for = self.loaded_model.waiting_for if self.loaded_model is not None else ""
        return f", waiting for room in memory ({waiting_for})" if waiting_for else ""

    @property
    def is_unloading(self) -> bool:
        return self.unloading is not None and not self.unloading.done()

    def status(self) -> ModelStatus:
        engine = self.engine
        hang_report = engine.hang_report if engine is not None and self.state is State.READY else ""
        slow_load_warning = self.loaded_model.slow_load_warning() if self.loaded_model is not None else ""
        requests_per_s, p95_s = self.stats.recent()
        return ModelStatus(
            spec=self.spec,
            state=State.HUNG if hang_report else self.state,
            preload=self.preload,
            created=self.created,
            error=hang_report or self.error or slow_load_warning or None,
            restarts=self.restarts,
            snapshot=self.snapshot,
            description=engine.description if engine is not None else None,
            waiting_inputs=engine.waiting_inputs if engine is not None else 0,
            waiting_tokens=engine.waiting_tokens if engine is not None else 0,
            configured=self.configured,
            loaded_at=self.loaded_at if engine is not None else None,
            last_used=self.stats.last_unix,
            requests_served=self.stats.served,
            requests_per_s=requests_per_s,
            p95_s=p95_s,
            memory_bytes=engine.memory_bytes if engine is not None else None,
            unload_reason=self.unload_reason,
            unloads=dict(self.unloads),
        )


WINDOW_S = 60.0
"""How far back requests a second and the 95th percentile look."""
_KEPT = 1024
"""Requests that are looked back at, at most; where more came within the window, the last of them speak for it."""


class RequestStats:
    """The requests of one model. Used on one event loop; `record` costs less than a microsecond."""

    def __init__(self) -> None:
        self.served = 0
        """Requests that were answered."""
        self.last: float | None = None
        """When one last ended, `time.monotonic()`."""
        self._recent: deque[tuple[float, float]] = deque(maxlen=_KEPT)

    def record(self, began: float, ended: float, *, answered: bool) -> None:
        """Count a request, its times as `time.monotonic()` has them."""
        self.last = ended
        if answered:
            self.served += 1
            self._recent.append((ended, ended - began))

    @property
    def last_unix(self) -> float | None:
        """When a request last ended, Unix time in seconds."""
        return None if self.last is None else time.time() - (time.monotonic() - self.last)

    def recent(self, now: float | None = None) -> tuple[float, float | None]:
        """Return answered requests a second, and the time in seconds that 95 % of them took at most.

        Of the last minute before `now`, which is the present unless it is given.
        """
        now = time.monotonic() if now is None else now
        within = [(ended, took) for ended, took in self._recent if now - ended <= WINDOW_S]
        if not within:
            return 0.0, None
        # A full memory may go back less far than the window does.
        since = now - within[0][0] if len(within) == _KEPT else WINDOW_S
        times = sorted(took for _, took in within)
        return len(within) / max(since, 1e-3), times[min(len(times) - 1, int(0.95 * len(times)))]
