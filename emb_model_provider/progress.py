"""Progress and cancellation of long work, from the thread or process that does it to the user who waits."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TextIO

from emb_model_provider.concurrency import start_thread
from emb_model_provider.errors import OperationCancelledError
from emb_model_provider.formatting import format_duration, format_estimate, format_size

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

logger = logging.getLogger(__name__)

Phase = Literal[
    "resolve", "download", "transfer", "verify", "compile", "compare", "tune", "load",
    "upload", "validate", "answer", "finalize",
]  # fmt: skip
"""Phases of preparing a model: look it up on its hub, download its files (or transfer them to another hub), hash them,
compile the model, compare the compiled model with the reference, load it into memory; and those of a batch: upload its
requests, check them, answer them, put the results together."""
Mode = Literal["auto", "plain", "json", "none", "log"]
"""How progress is shown. auto: one line that is redrawn on a terminal, else plain lines. log: log lines."""

_REDRAW_S = 0.2
_RATE_S = 5.0
_ESTIMATE_S = 30.0
"""Seconds over which the shown rate, and that of the estimate of the time left, are averaged. Files arrive in bursts, with
pauses between small files, so that an estimate from the last few seconds would jump."""
_MIN_MEASURED_S = 0.5
_MIN_NAME_WIDTH = 8
_CLEAR_LINE = "\r\x1b[2K"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the preparation of one model has come."""

    phase: Phase
    model: str
    """The repository, as its hub calls it."""
    done_bytes: int = 0
    """Over all files together. It decreases if a file is downloaded again."""
    total_bytes: int | None = None
    """None if the work is not measured in bytes."""
    step: str = ""
    """The step of compiling or comparing, such as `convert`."""
    step_number: int | None = None
    """Number of the step, from 1; None if it is unknown."""
    step_count: int | None = None
    seconds_left: float | None = None
    """Estimate of the time until the last step ends."""
    resumed_bytes: int = 0
    """Of `done_bytes`, those of an earlier download, which say nothing about the rate."""

    @property
    def transferred_bytes(self) -> int:
        return self.done_bytes - self.resumed_bytes

    def describe(self) -> str:
        """Return a text such as `step 3 of 6 (export), about 20 s left`, or an empty one if there is nothing to say."""
        if self.step_number is not None:
            left = f", about {format_estimate(self.seconds_left)} left" if self.seconds_left is not None else ""
            return f"step {self.step_number} of {self.step_count} ({self.step}){left}"
        if self.total_bytes and self.phase != "load":
            share = f"{self.done_bytes * 100 // self.total_bytes} %"
            return f"{self.phase} {format_size(self.done_bytes)} of {format_size(self.total_bytes)} ({share})"
        return "waiting for the compiler" if self.phase == "compile" else ""


OnProgress = Callable[[Progress], None]
"""Called from one thread at a time, not always the same one. Must return quickly."""


def ignore_progress(_: Progress) -> None:
    """Do nothing. The default of `on_progress` parameters."""


Outcome = Literal["ok", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class WorkRecord:
    """Measurements of a download or a compilation that has ended."""

    kind: Literal["download", "compile"]
    model: str
    """The model, as the request or the settings call it."""
    outcome: Outcome
    duration_s: float
    transferred_bytes: int
    """Of a download, over all its repositories."""


OnWork = Callable[[WorkRecord], None]
"""Called on the thread that did the work."""


@contextmanager
def measure_work(
    kind: Literal["download", "compile"], model: str, on_progress: OnProgress, on_work: OnWork
) -> Iterator[OnProgress]:
    """Measure the work of a block, which must report its progress to the returned function.

    Nothing is recorded if the phase `kind` does not occur, because then nothing was downloaded or compiled.
    """
    started: float | None = None
    transferred: dict[str, int] = {}
    outcome: Outcome = "failed"

    def report(progress: Progress) -> None:
        nonlocal started
        if progress.phase == kind:
            started = time.monotonic() if started is None else started
            transferred[progress.model] = max(transferred.get(progress.model, 0), progress.transferred_bytes)
        on_progress(progress)

    try:
        yield report
        outcome = "ok"
    except OperationCancelledError:
        outcome = "cancelled"
        raise
    finally:
        if started is not None:
            on_work(WorkRecord(kind, model, outcome, time.monotonic() - started, sum(transferred.values())))


class CancelToken:
    """Tells long work to stop. Thread-safe; cancelling cannot be undone."""

    def __init__(self, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        """Create a token; `is_cancelled` is a further condition under which the work stops, called on any thread."""
        self._event = threading.Event()
        self._condition = is_cancelled

    def cancel(self) -> None:
        self._event.set()

    @property
    def is_cancelled(self) -> bool:
        return self._event.is_set() or self._condition()

    def raise_if_cancelled(self) -> None:
        """Raise OperationCancelledError if the token was cancelled."""
        if self.is_cancelled:
            raise OperationCancelledError("The operation was cancelled.")


class ProgressReporter:
    """Shows the progress of one model after the other. A context manager, and an `OnProgress` callback. Thread-safe.

    There is a line at the start of each phase, every `every_s` seconds, and for every tenth of the bytes; a terminal is
    redrawn several times a second. A log has a line at the start of a download, and every `every_s` seconds. A download
    without a byte for `stall_s` seconds is reported. The time left is shown after `estimate_s` seconds, because the rate of
    the first seconds says little.
    """

    def __init__(
        self,
        mode: Mode,
        *,
        stream: TextIO | None = None,
        every_s: float = 10.0,
        stall_s: float = 20.0,
        estimate_s: float = 3.0,
    ) -> None:
        """Create a reporter that writes to `stream`, or to stderr if it is None."""
        self._mode = mode
        self._stream = stream or sys.stderr
        self._redraws = mode == "auto" and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._every_s = every_s
        self._stall_s = stall_s
        self._estimate_s = estimate_s
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._label: str | None = None
        self._name = ""
        self._last: Progress | None = None
        self._started_at = self._moved_at = self._stalled_at = self._shown_at = time.monotonic()
        self._rate = RateMeter(0, self._started_at)
        self._shown_tenth = 0
        self._is_drawn = False

    def __enter__(self) -> Self:
        start_thread(self._watcher)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._watcher.join()
        with self._lock:
            self._clear()

    def model(self, name: str) -> None:
        """Set the name under which the progress that follows is shown. Default: the name in the progress."""
        with self._lock:
            if name != self._label:
                self._label = self._name = name
                self._last = None

    def __call__(self, progress: Progress) -> None:
        with self._lock:
            now = time.monotonic()
            last, self._last = self._last, progress
            self._name = self._label or progress.model
            if last is None or (last.phase, last.model) != (progress.phase, progress.model):
                self._started_at = self._moved_at = self._stalled_at = now
                self._rate = RateMeter(progress.transferred_bytes, now)
                # Most other phases are short, and a log should have few lines about them.
                if self._mode != "log" or progress.phase in ("download", "transfer") or self._is_due(progress, now):
                    self._show(progress, now)
                return
            if last.done_bytes != progress.done_bytes:
                self._moved_at = self._stalled_at = now
            self._rate.update(progress.transferred_bytes, now)
            if self._is_due(progress, now):
                self._show(progress, now)

    def note(self, text: str) -> None:
        """Show a line that is not redrawn."""
        with self._lock:
            self._clear()
            match self._mode:
                case "log":
                    logger.warning("%s", text)
                case "json":
                    self._write(json.dumps({"model": self._name, "note": text}) + "\n")
                case _:
                    self._write(text + "\n")

    def done(self) -> None:
        """Show that the model is ready."""
        with self._lock:
            self._last = None
            self._print(Status(phase="ready"))

    def _is_due(self, progress: Progress, now: float) -> bool:
        waited_s = now - self._shown_at
        if self._redraws:
            return waited_s >= _REDRAW_S or progress.done_bytes == progress.total_bytes
        is_next_tenth = self._mode != "log" and _tenth_of(progress) > self._shown_tenth
        return is_next_tenth or waited_s >= self._every_s

    def _show(self, progress: Progress, now: float) -> None:
        self._shown_at, self._shown_tenth = now, _tenth_of(progress)
        total = progress.total_bytes or None
        is_measured = bool(total) and progress.phase in ("download", "transfer", "verify", "upload")
        elapsed_s = now - self._started_at
        self._print(
            Status(
                phase=progress.phase,
                step=progress.step,
                step_number=progress.step_number,
                step_count=progress.step_count,
                done_bytes=progress.done_bytes if total else None,
                total_bytes=total,
                bytes_per_s=self._rate.bytes_per_s if is_measured else None,
                seconds_left=self._rate.seconds_for(total - progress.done_bytes)
                if total and is_measured and elapsed_s >= self._estimate_s
                else progress.seconds_left,
                elapsed_s=elapsed_s,
            )
        )

    def _print(self, status: Status) -> None:
        match self._mode:
            case "none":
                pass
            case "log":
                logger.info("%s: %s", self._name, status.descriptions()[0])
            case "json":
                self._write(json.dumps(status.to_json(self._name)) + "\n")
            case _ if self._redraws:
                self._write(_CLEAR_LINE + _fit(self._name, status.descriptions(), _columns(self._stream) - 1))
                self._is_drawn = True
            case _:
                self._write(f"{self._name}: {status.descriptions()[0]}\n")

    def _watch(self) -> None:
        """Show phases that take long without a report, and downloads that receive nothing."""
        while not self._stop.wait(min(1.0, self._stall_s / 4)):
            with self._lock:
                progress, now = self._last, time.monotonic()
                if progress is None or self._mode == "none":
                    continue
                self._rate.update(progress.transferred_bytes, now)
                is_downloading = progress.phase in ("download", "transfer") and bool(progress.total_bytes)
                if is_downloading and now - self._stalled_at >= self._stall_s:
                    self._stalled_at = now
                    self.note(f"{self._name}: no bytes for {now - self._moved_at:.0f} s, still trying")
                if self._redraws or now - self._shown_at >= self._every_s:
                    self._show(progress, now)

    def _clear(self) -> None:
        if self._is_drawn:
            self._write(_CLEAR_LINE)
            self._is_drawn = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The content of one line of progress."""

    phase: str
    step: str = ""
    step_number: int | None = None
    step_count: int | None = None
    done_bytes: int | None = None
    total_bytes: int | None = None
    bytes_per_s: float | None = None
    seconds_left: float | None = None
    elapsed_s: float = 0.0
    """Since the phase began."""

    def descriptions(self) -> list[str]:
        """Return a text such as `download 12.0 MB of 90.9 MB (13 %), 4.1 MB/s, 0:19 left`, then shorter ones."""
        phase = f"{self.phase} ({self.step})" if self.step else self.phase
        if self.step_number is not None:
            number = f"step {self.step_number} of {self.step_count}"
            left = f", about {format_estimate(self.seconds_left)} left" if self.seconds_left is not None else ""
            return [f"{self.phase}, {number} ({self.step}){left}", f"{self.phase}, {number}{left}", f"{number}{left}"]
        if self.done_bytes is None or not self.total_bytes:
            elapsed = f", {format_duration(self.elapsed_s)}" if self.elapsed_s >= 1 else ""
            return [f"{phase}{elapsed}", f"{self.phase}{elapsed}"]
        sizes = f"{format_size(self.done_bytes)} of {format_size(self.total_bytes)}"
        share = f"{self.done_bytes * 100 // self.total_bytes} %"
        rest = f", {format_size(self.bytes_per_s)}/s" if self.bytes_per_s is not None else ""
        if self.seconds_left is not None:
            rest += f", {format_duration(self.seconds_left)} left"
        return [f"{phase} {sizes} ({share}){rest}", f"{phase} {share}{rest}", f"{share}{rest}"]

    def to_json(self, model: str) -> dict[str, str | int | None]:
        return {
            "model": model,
            "phase": self.phase,
            "step": self.step or None,
            "step_number": self.step_number,
            "step_count": self.step_count,
            "done_bytes": self.done_bytes,
            "total_bytes": self.total_bytes,
            "bytes_per_s": round(self.bytes_per_s) if self.bytes_per_s is not None else None,
            "seconds_left": round(self.seconds_left) if self.seconds_left is not None else None,
        }


class RateMeter:
    """Measures bytes per second, as exponential moving averages over the last seconds."""

    def __init__(self, done_bytes: int, now: float) -> None:
        self._rate, self._estimate = _MovingAverage(_RATE_S), _MovingAverage(_ESTIMATE_S)
        self._done_bytes, self._updated_at = done_bytes, now

    def update(self, done_bytes: int, now: float) -> None:
        """Take a sample. Call it also while nothing arrives, so that the rate falls."""
        if done_bytes >= self._done_bytes:  # else a file is downloaded again
            for average in (self._rate, self._estimate):
                average.add(done_bytes - self._done_bytes, now - self._updated_at)
        self._done_bytes, self._updated_at = done_bytes, now

    @property
    def bytes_per_s(self) -> float | None:
        """None if it is unknown, which it is at first, or less than 1."""
        return self._rate.per_s

    def seconds_for(self, count: int) -> float | None:
        """Return an estimate of how long further bytes take; None if it is unknown. It changes slowly."""
        rate = self._estimate.per_s
        return count / rate if rate is not None else None


class _MovingAverage:
    """A rate over the last seconds, each of which has less weight than the next one; at first, over all seconds."""

    def __init__(self, seconds: float) -> None:
        self._constant_s = seconds
        self._count = self._seconds = 0.0

    def add(self, count: int, seconds: float) -> None:
        decay = math.exp(-seconds / self._constant_s)
        self._count = self._count * decay + count
        self._seconds = self._seconds * decay + seconds

    @property
    def per_s(self) -> float | None:
        # The first bytes arrive at the same moment as the announcement of the phase.
        rate = self._count / self._seconds if self._seconds >= _MIN_MEASURED_S else 0.0
        return rate if rate >= 1 else None


def _tenth_of(progress: Progress) -> int:
    return progress.done_bytes * 10 // progress.total_bytes if progress.total_bytes else 0


def _columns(stream: TextIO) -> int:
    """Return the width of a terminal. `shutil` only asks stdout, which may be a file."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return columns or shutil.get_terminal_size().columns


def _fit(name: str, descriptions: list[str], width: int) -> str:
    """Return a line of at most `width` columns, with the longest description that leaves space for the name.

    A name that is too long loses its beginning, because its end says more.
    """
    from tqdm.utils import disp_len

    needed = min(disp_len(name), _MIN_NAME_WIDTH) + len(": ")
    text = next((text for text in descriptions if len(text) + needed <= width), descriptions[-1])
    space = width - len(text) - len(": ")
    if disp_len(name) > space:
        while name and disp_len(name) > space - len("..."):
            name = name[1:]
        name = f"...{name}" if name else ""
    return f"{name}: {text}" if name else text[:width]
