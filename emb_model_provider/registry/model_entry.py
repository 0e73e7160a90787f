"""The record that the registry keeps of each model: its state, the loaded model, and statistics of its requests."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from emb_model_provider.backends.base import ModelDescription, Task
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.progress import Progress
    from emb_model_provider.serving.engine import Engine
    from emb_model_provider.snapshots.locks import FileLock
    from emb_model_provider.snapshots.snapshot import Snapshot

WINDOW_S = 60.0
"""Period over which request rates and latencies are measured, in seconds."""
_MAX_SAMPLES = 1024
"""Requests that are kept for these measurements. If there are more within the period, the last ones count."""


class State(StrEnum):
    """State of a model, from its name in the settings to a running engine."""

    UNLOADED = "unloaded"
    DOWNLOADING = "downloading"
    COMPILING = "compiling"
    LOADING = "loading"
    READY = "ready"
    HUNG = "hung"
    FAILED = "failed"
    UNLOADING = "unloading"


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A served model of the primary worker, as it tells the others."""

    spec: ModelSpec
    configured: bool
    on_demand: bool
    use: Literal["unload", "keep", "load"]
    """What other workers do: unload it; keep it if they have it, because the primary is loading it; or load it."""
    snapshot: Snapshot | None
    """Where it is loaded from. None unless it is to be loaded."""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """The status of a served model at one moment. Times are Unix time in seconds, or None if they do not apply."""

    spec: ModelSpec
    state: State
    preload: bool
    required: bool
    """Whether `/ready` requires it."""
    created: int
    """When the model was last loaded, or when the service started."""
    error: str | None
    """Why it failed, hangs, is being restarted, or takes long to load, in one line."""
    progress: Progress | None = field(default=None, kw_only=True)
    """How far its download or its compilation has come."""
    restarts: int
    snapshot: Snapshot | None
    description: ModelDescription | None
    waiting_inputs: int
    waiting_tokens: int
    configured: bool = True
    """Whether the model is in the settings. Otherwise it was added at run time."""
    loaded_at: float | None = None
    last_used: float | None = None
    """When the last request ended."""
    requests_served: int = 0
    requests_per_s: float = 0.0
    """Over the last 60 seconds."""
    p95_s: float | None = None
    """95th-percentile latency over the last 60 seconds, in seconds, excluding load time."""
    memory_bytes: int | None = None
    """Memory of the loaded model in bytes; see `backends.memory_estimate`."""
    unload_reason: str | None = None
    """Why it was unloaded; None once it is loaded again."""
    unloads: Mapping[str, int] = field(default_factory=dict)
    """Number of unloads by reason."""
    waiting_requests: int = 0
    """Requests that wait for their first batch."""
    running_requests: int = 0
    """Requests of which a batch has begun, and that are not answered."""

    @property
    def tasks(self) -> tuple[Task, ...] | None:
        """What requests can ask the model for; None before it is loaded."""
        return self.description.tasks if self.description is not None else None

    @property
    def progress_text(self) -> str | None:
        return self.progress.describe() or None if self.progress is not None else None

    @property
    def is_available(self) -> bool:
        """Whether requests can be answered: at once, or after loading the model again."""
        if self.state in (State.FAILED, State.HUNG):
            return False
        return self.state is State.READY or (self.unload_reason is not None and self.error is None)


class RequestStats:
    """Statistics of the requests of one model. Used on one event loop; `record` takes less than a microsecond."""

    def __init__(self) -> None:
        self.served = 0
        """Number of answered requests."""
        self.last: float | None = None
        """When the last request ended, as `time.monotonic()`."""
        self._recent: deque[tuple[float, float]] = deque(maxlen=_MAX_SAMPLES)

    def record(self, began: float, ended: float, *, answered: bool) -> None:
        """Record a request. Times are those of `time.monotonic()`."""
        self.last = ended
        if answered:
            self.served += 1
            self._recent.append((ended, ended - began))

    def take(self) -> tuple[int, float | None, list[tuple[float, float]]]:
        """Return what was recorded, and forget it. For a worker that reports it to the primary."""
        taken = self.served, self.last, list(self._recent)
        self.served = 0
        self._recent.clear()
        return taken

    def add(self, served: int, last: float | None, recent: Sequence[tuple[float, float]]) -> None:
        """Add what another worker recorded, whose clock is the same."""
        self.served += served
        self.last = max(filter(None, (self.last, last)), default=None)
        self._recent.extend(recent)

    def recent(self, now: float) -> tuple[float, float | None]:
        """Return answered requests per second and the 95th-percentile latency, over the 60 seconds before `now`.

        The latency is in seconds, or None without requests.
        """
        samples = [(ended, took) for ended, took in self._recent if now - ended <= WINDOW_S]
        if not samples:
            return 0.0, None
        # If the buffer is full, it may cover less than the period.
        period_s = now - samples[0][0] if len(samples) == _MAX_SAMPLES else WINDOW_S
        latencies = sorted(took for _, took in samples)
        p95_s = latencies[min(len(latencies) - 1, int(0.95 * len(latencies)))]
        return len(samples) / max(period_s, 1e-3), p95_s


@dataclass(eq=False, slots=True)
class LoadedModel:
    """One stay of a model in memory, from the start of the load to the end of the unload.

    Requests waiting for the load count as users, so that the model cannot be evicted before it has served them.
    """

    entry: ModelEntry
    engine: Engine | None = None
    """None until the model is loaded."""
    is_interim: bool = False
    """Whether torch runs the model until it is compiled."""
    loading: asyncio.Task[None] = field(init=False)
    snapshot_lock: FileLock | None = None
    """Lock that keeps the snapshot on disk, because a crashed model is loaded from it again."""
    ref_count: int = 0
    """Number of requests that use the model or wait for it."""
    since: float = field(default_factory=time.monotonic)
    """When the load started; once the model is loaded, when it ended."""
    expected_bytes: int = 0
    waiting_for: str = ""
    """What the load waits for before it gets memory, or an empty string."""
    step_started_at: float | None = None
    """When the load began to wait for memory, or when it got memory. None before."""
    _idle: asyncio.Event | None = None

    @property
    def memory_bytes(self) -> int:
        """Memory of the model in bytes. During the load it is an estimate."""
        return self.engine.memory_bytes if self.engine is not None else self.expected_bytes

    @property
    def last_used_at(self) -> float:
        """When the model was loaded or last used, as `time.monotonic()`."""
        return max(self.since, self.entry.stats.last or 0.0)

    def slow_load_warning(self) -> str:
        """Return a warning if the load takes unusually long, or an empty string."""
        if self.engine is not None or self.step_started_at is None:
            return ""
        took_s = time.monotonic() - self.step_started_at
        if took_s < self.entry.slow_load_s:
            return ""
        if self.waiting_for:
            return f"It has been waiting for memory for {took_s:.0f} s: {self.waiting_for}."
        advice = "A load cannot be aborted: if it does not end, restart the service."
        return f"It has been loading for {took_s:.0f} s. {advice}"

    def release_ref(self) -> None:
        self.ref_count -= 1
        if not self.ref_count and self._idle is not None:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no request uses the model. Called once, when the model accepts no new requests."""
        if self.ref_count:
            self._idle = asyncio.Event()
            await self._idle.wait()


@dataclass(eq=False, slots=True, kw_only=True)
class ModelEntry:
    """A served model, in memory or not."""

    spec: ModelSpec
    preload: bool = False
    required: bool = False
    configured: bool = False
    on_demand: bool = False
    """Whether it is served because it is on disk. Then it is never downloaded."""
    slow_load_s: float
    """After how many seconds a load that has not ended is reported."""
    created: int = field(default_factory=lambda: int(time.time()))
    state: State = State.UNLOADED
    loaded_model: LoadedModel | None = None
    """The stay in memory that new requests use."""
    unloading: asyncio.Task[None] | None = None
    snapshot: Snapshot | None = None
    given_snapshot: Snapshot | None = None
    """The snapshot from which the model must be loaded, because the primary worker has loaded it from there."""
    may_serve: bool = True
    """Whether requests may use the model. False in a worker that is to unload it."""
    measured_bytes: int | None = None
    """Memory of the model when it was last loaded, in bytes."""
    error: str | None = None
    progress: Progress | None = None
    """How far a load, or the compilation of a model that torch serves, has come. None if there is none."""
    waits_for_compiler: bool = False
    """Whether torch failed to serve the model while it was compiled."""
    failed_at: float = 0.0
    restarts: int = 0
    loaded_at: float | None = None
    unload_reason: str | None = None
    unloads: Counter[str] = field(default_factory=Counter)
    removed: bool = False
    stats: RequestStats = field(default_factory=RequestStats)

    @property
    def engine(self) -> Engine | None:
        return self.loaded_model.engine if self.loaded_model is not None else None

    @property
    def is_unloading(self) -> bool:
        return self.unloading is not None and not self.unloading.done()

    def published(self) -> PublishedModel:
        """Return what other workers have to know."""
        loaded_model = self.loaded_model
        if loaded_model is None:
            return PublishedModel(self.spec, self.configured, self.on_demand, "unload", None)
        if loaded_model.engine is None or loaded_model.is_interim:
            return PublishedModel(self.spec, self.configured, self.on_demand, "keep", None)
        return PublishedModel(self.spec, self.configured, self.on_demand, "load", self.snapshot)

    def status(self) -> ModelStatus:
        engine = self.engine
        hang_report = engine.hang_report if engine is not None and self.state is State.READY else ""
        slow_load_warning = self.loaded_model.slow_load_warning() if self.loaded_model is not None else ""
        now = time.monotonic()
        requests_per_s, p95_s = self.stats.recent(now)
        waiting, running = engine.count_requests() if engine is not None else (0, 0)
        return ModelStatus(
            spec=self.spec,
            state=State.HUNG if hang_report else self.state,
            preload=self.preload,
            required=self.required,
            created=self.created,
            error=hang_report or self.error or slow_load_warning or None,
            progress=self.progress,
            restarts=self.restarts,
            snapshot=self.snapshot,
            description=engine.description if engine is not None else None,
            waiting_inputs=engine.waiting_inputs if engine is not None else 0,
            waiting_tokens=engine.waiting_tokens if engine is not None else 0,
            configured=self.configured,
            loaded_at=self.loaded_at if engine is not None else None,
            last_used=None if self.stats.last is None else time.time() - (now - self.stats.last),
            requests_served=self.stats.served,
            requests_per_s=requests_per_s,
            p95_s=p95_s,
            memory_bytes=engine.memory_bytes if engine is not None else None,
            unload_reason=self.unload_reason,
            unloads=dict(self.unloads),
            waiting_requests=waiting,
            running_requests=running,
        )
