"""Shows progress: a line that is redrawn on a terminal, lines elsewhere, JSON, or log lines."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TextIO

from tqdm.std import EMA
from tqdm.utils import disp_len

from emb_model_provider.formatting import format_duration, format_size

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from emb_model_provider.progress import Progress

logger = logging.getLogger(__name__)

Mode = Literal["auto", "plain", "json", "none", "log"]
_Output = Literal["terminal", "plain", "json", "none", "log"]

_REDRAW_S = 0.2
_SAMPLE_S = 0.5
_SMOOTHING = 0.2
"""Weight of the latest sample in the rate. Samples of more than a few seconds ago count little."""
_MIN_NAME_WIDTH = 8
_CLEAR_LINE = "\r\x1b[2K"


class ProgressReporter:
    """Shows the progress of one model after the other. A context manager, and an `OnProgress` callback.

    A line is shown at the start of each phase, then on a terminal several times a second, and elsewhere for every tenth
    of the bytes and every `every_s` seconds. A download that receives nothing for `stall_s` seconds is reported.
    Thread-safe.
    """

    def __init__(
        self, mode: Mode = "auto", *, stream: TextIO | None = None, every_s: float = 10.0, stall_s: float = 20.0
    ) -> None:
        """Create a reporter.

        Args:
            mode: `auto` redraws a line if the stream is a terminal, else it is `plain`. `log` also redraws a line on a
                terminal, else it writes log lines; its notes are always log lines.
            stream: Where to write; None is stderr.
            every_s: Seconds between lines of one phase.
            stall_s: Seconds without a byte after which a download is reported as stalled.
        """
        self._stream = stream if stream is not None else sys.stderr  # None in a process without stderr
        self._output = _choose_output(mode, self._stream)
        self._logs_notes = mode == "log"
        self._every_s = every_s
        self._stall_s = stall_s
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
        self._watcher.start()
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
            is_new = last is None or (last.phase, last.model) != (progress.phase, progress.model)
            if is_new:
                self._started_at = now
                self._rate = RateMeter(progress.done_bytes, now)
            if last is None or is_new or last.done_bytes != progress.done_bytes:
                self._moved_at = self._stalled_at = now
            self._rate.update(progress.done_bytes, now)
            if is_new or self._is_due(progress, now):
                self._show(progress, now)

    def note(self, text: str) -> None:
        """Show a line that is not redrawn."""
        with self._lock:
            self._clear()
            if self._logs_notes:
                logger.warning("%s", text)
            elif self._output == "json":
                self._write(json.dumps({"model": self._name, "note": text}) + "\n")
            else:
                self._write(text + "\n")

    def done(self) -> None:
        """Show that the model is ready."""
        with self._lock:
            self._last = None
            self._print(Status(phase="ready"))

    def _is_due(self, progress: Progress, now: float) -> bool:
        waited_s = now - self._shown_at
        if self._output == "terminal":
            return waited_s >= _REDRAW_S or progress.done_bytes == progress.total_bytes
        return waited_s >= self._every_s or _tenth_of(progress) > self._shown_tenth

    def _show(self, progress: Progress, now: float) -> None:
        self._shown_at, self._shown_tenth = now, _tenth_of(progress)
        total = progress.total_bytes or None
        rate = self._rate.bytes_per_s if progress.phase in ("download", "verify") else None
        self._print(
            Status(
                phase=progress.phase,
                step=progress.step,
                done_bytes=progress.done_bytes if total else None,
                total_bytes=total,
                bytes_per_s=rate,
                seconds_left=(total - progress.done_bytes) / rate if total and rate else None,
                elapsed_s=now - self._started_at,
            )
        )

    def _print(self, status: Status) -> None:
        match self._output:
            case "none":
                pass
            case "json":
                self._write(json.dumps(status.to_json(self._name)) + "\n")
            case "log":
                logger.info("%s: %s", self._name, status.describe())
            case "plain":
                self._write(f"{self._name}: {status.describe()}\n")
            case "terminal":
                self._write(_CLEAR_LINE + _fit(self._name, status, _columns(self._stream) - 1))
                self._is_drawn = True

    def _watch(self) -> None:
        """Show phases that take long without a report, and downloads that receive nothing."""
        while not self._stop.wait(min(1.0, self._stall_s / 4)):
            with self._lock:
                progress, now = self._last, time.monotonic()
                if progress is None or self._output == "none":
                    continue
                self._rate.update(progress.done_bytes, now)
                is_downloading = progress.phase == "download" and bool(progress.total_bytes)
                if is_downloading and now - self._stalled_at >= self._stall_s:
                    self._stalled_at = now
                    self.note(f"{self._name}: no bytes for {now - self._moved_at:.0f} s, still trying")
                if self._output == "terminal" or now - self._shown_at >= self._every_s:
                    self._show(progress, now)

    def _clear(self) -> None:
        if self._is_drawn:
            self._write(_CLEAR_LINE)
            self._is_drawn = False

    def _write(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(text)
            self._stream.flush()


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The content of one line of progress."""

    phase: str
    step: str = ""
    done_bytes: int | None = None
    total_bytes: int | None = None
    bytes_per_s: float | None = None
    seconds_left: float | None = None
    elapsed_s: float = 0.0
    """Since the phase began."""

    def describe(self) -> str:
        """Return `download 12.0 MB of 90.9 MB (13 %), 4.1 MB/s, 0:19 left`, or `compile (convert), 0:12`."""
        return self.lines()[0]

    def lines(self) -> list[str]:
        """Return the description, then shorter ones without sizes, step or phase, for narrow terminals."""
        phase = f"{self.phase} ({self.step})" if self.step else self.phase
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
            "done_bytes": self.done_bytes,
            "total_bytes": self.total_bytes,
            "bytes_per_s": round(self.bytes_per_s) if self.bytes_per_s is not None else None,
            "seconds_left": round(self.seconds_left) if self.seconds_left is not None else None,
        }


class RateMeter:
    """Measures bytes per second, as an exponential moving average over the last seconds."""

    def __init__(self, done_bytes: int, now: float) -> None:
        self._bytes, self._seconds = EMA(_SMOOTHING), EMA(_SMOOTHING)
        self._done_bytes, self._sampled_at = done_bytes, now

    def update(self, done_bytes: int, now: float) -> None:
        """Take a sample. Call it also while nothing arrives, so that the rate falls."""
        if done_bytes < self._done_bytes:  # a file is downloaded again
            self._done_bytes, self._sampled_at = done_bytes, now
        elif now - self._sampled_at >= _SAMPLE_S:
            self._bytes(done_bytes - self._done_bytes)
            self._seconds(now - self._sampled_at)
            self._done_bytes, self._sampled_at = done_bytes, now

    @property
    def bytes_per_s(self) -> float | None:
        """None if it is unknown, which it is at first, or less than 1."""
        seconds: float = self._seconds()
        rate: float = self._bytes() / seconds if seconds else 0.0
        return rate if rate >= 1 else None


def _choose_output(mode: Mode, stream: TextIO | None) -> _Output:
    is_terminal = stream is not None and stream.isatty() and os.environ.get("TERM", "") != "dumb"
    match mode:
        case "auto":
            return "terminal" if is_terminal else "plain"
        case "log":
            return "terminal" if is_terminal else "log"
        case _:
            return mode


def _tenth_of(progress: Progress) -> int:
    return progress.done_bytes * 10 // progress.total_bytes if progress.total_bytes else 0


def _columns(stream: TextIO | None) -> int:
    """Return the width of a terminal. `shutil` only asks stdout, which may be a file."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns if stream is not None else 0
    except (OSError, ValueError):
        columns = 0
    return columns or shutil.get_terminal_size().columns


def _fit(name: str, status: Status, width: int) -> str:
    """Return a line of at most `width` columns. The figures matter more than the sizes, the phase and the name."""
    lines = status.lines()
    needed = min(disp_len(name), _MIN_NAME_WIDTH) + len(": ")
    text = next((line for line in lines if len(line) + needed <= width), lines[-1])
    name = _shorten(name, width - len(text) - len(": "))
    return f"{name}: {text}" if name else text[:width]


def _shorten(name: str, width: int) -> str:
    """Return a name, or as much of its end as fits, because the end says more than the beginning."""
    if disp_len(name) <= width:
        return name
    while name and disp_len(name) > width - len("..."):
        name = name[1:]
    return f"...{name}" if name else ""
