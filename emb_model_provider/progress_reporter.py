"""Shows progress: a line that is redrawn on a terminal, lines elsewhere, JSON, or log lines."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Literal, TextIO

from emb_model_provider.formatting import format_duration, format_size

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from emb_model_provider.progress import Progress

logger = logging.getLogger(__name__)

Mode = Literal["auto", "plain", "json", "none", "log"]

_REDRAW_S = 0.2


class ProgressReporter:
    """Shows the progress of one model after the other. A context manager, and an `OnProgress` callback.

    A line is shown at the start of each phase, then on a terminal several times a second, and elsewhere for every tenth
    of the bytes and every `every_s` seconds. A download that receives nothing for `stall_s` seconds is reported.
    Thread-safe.
    """

    def __init__(
        self,
        mode: Mode = "auto",
        *,
        stream: TextIO | None = None,
        every_s: float = 10.0,
        stall_s: float = 20.0,
    ) -> None:
        """Create a reporter.

        Args:
            mode: `auto` redraws a line if the stream is a terminal, else it is `plain`; `log` does so too, and else
                writes log lines.
            stream: Where to write; None is stderr.
            every_s: Seconds between lines of one phase.
            stall_s: Seconds without a byte after which a download is reported as stalled.
        """
        self._stream = stream if stream is not None else sys.stderr
        self.mode: Mode | Literal["terminal"] = _resolve(mode, self._stream)
        self._every_s = every_s
        self._stall_s = stall_s
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._label = ""
        self._last: Progress | None = None
        self._meter: Any = None
        self._moved_at = self._stalled_at = self._shown_at = time.monotonic()
        self._shown_tenth = -1
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
        """Name the model that is worked on from now on, if users know it by another name than its repository."""
        with self._lock:
            self._label, self._last = name, None

    def __call__(self, progress: Progress) -> None:
        with self._lock:
            last, self._last = self._last, progress
            now = time.monotonic()
            is_new = last is None or (last.phase, last.model) != (progress.phase, progress.model)
            if is_new:
                self._meter = _make_meter(progress)
                self._shown_tenth = -1
            if is_new or last is None or last.done_bytes != progress.done_bytes:
                self._moved_at = self._stalled_at = now
            self._meter.total = progress.total_bytes
            self._meter.update(progress.done_bytes - self._meter.n)
            tenth = progress.done_bytes * 10 // progress.total_bytes if progress.total_bytes else 0
            is_done = bool(progress.total_bytes) and progress.done_bytes == progress.total_bytes
            if self.mode == "terminal":
                is_due = is_new or is_done or now - self._shown_at >= _REDRAW_S
            else:
                is_due = is_new or tenth > self._shown_tenth or now - self._shown_at >= self._every_s
            if is_due:
                self._shown_tenth = tenth
                self._show(progress, now)

    def note(self, text: str) -> None:
        """Show a line that is not redrawn."""
        with self._lock:
            self._clear()
            if self.mode == "log":
                logger.warning("%s", text)
            elif self.mode == "json":
                self._write(json.dumps({"model": self._label, "note": text}) + "\n")
            else:
                self._write(text + "\n")

    def done(self) -> None:
        """Show that the model is ready."""
        with self._lock:
            if self._last is not None:
                self._show_line("ready", self._last, None, None, 0.0)
            self._last = None

    def _show(self, progress: Progress, now: float) -> None:
        self._shown_at = now
        figures = self._meter.format_dict
        rate = figures["rate"] if progress.phase in ("download", "verify") else None
        left = None
        if rate and progress.total_bytes:
            left = (progress.total_bytes - progress.done_bytes) / rate
        self._show_line(progress.phase, progress, rate, left, figures["elapsed"])

    def _show_line(
        self, phase: str, progress: Progress, rate: float | None, left: float | None, elapsed_s: float
    ) -> None:
        if self.mode == "none":
            return
        name = self._label or progress.model
        if self.mode == "json":
            line = {
                "model": name,
                "phase": phase,
                "done_bytes": progress.done_bytes if progress.total_bytes else None,
                "total_bytes": progress.total_bytes,
                "bytes_per_s": round(rate) if rate else None,
                "seconds_left": round(left) if left is not None else None,
            }
            self._write(json.dumps(line) + "\n")
            return
        text = describe(phase, progress, rate, left, elapsed_s)
        if self.mode == "log":
            logger.info("%s: %s", name, text)
        elif self.mode == "plain":
            self._write(f"{name}: {text}\n")
        else:
            width = shutil.get_terminal_size().columns - 1
            if len(name) + 2 + len(text) > width:  # the figures matter more than the whole name
                name = f"…{name[len(name) + 3 + len(text) - width :]}"
            self._write(f"\r\x1b[2K{name}: {text}"[: width + 5])
            self._is_drawn = True

    def _watch(self) -> None:
        """Show phases that take long without a report, and downloads that receive nothing."""
        while not self._stop.wait(min(1.0, self._stall_s / 4)):
            with self._lock:
                progress, now = self._last, time.monotonic()
                if progress is None or self.mode == "none":
                    continue
                is_stalled = progress.phase == "download" and now - self._stalled_at >= self._stall_s
                if is_stalled and progress.total_bytes:
                    self._stalled_at = now
                    name = self._label or progress.model
                    self.note(f"{name}: no bytes for {now - self._moved_at:.0f} s, still trying")
                if self.mode == "terminal" or now - self._shown_at >= self._every_s:
                    self._show(progress, now)

    def _clear(self) -> None:
        if self._is_drawn:
            self._write("\r\x1b[2K")
            self._is_drawn = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def describe(
    phase: str, progress: Progress, rate: float | None, left_s: float | None, elapsed_s: float
) -> str:
    """Return one line: `download 12.0 MB of 90.9 MB (13 %), 4.1 MB/s, 0:19 left`, or `compile (convert), 0:12`."""
    line = phase if not progress.step or phase == "ready" else f"{phase} ({progress.step})"
    if progress.total_bytes:
        share = progress.done_bytes * 100 // progress.total_bytes
        line += f" {format_size(progress.done_bytes)} of {format_size(progress.total_bytes)} ({share} %)"
        if rate:
            line += f", {format_size(rate)}/s"
        if left_s is not None:
            line += f", {format_duration(left_s)} left"
    elif elapsed_s >= 1:
        line += f", {format_duration(elapsed_s)}"
    return line


def _make_meter(progress: Progress) -> Any:
    """Return what measures the rate of a phase."""
    from tqdm.std import tqdm  # imported only where it is used

    class Meter(tqdm):  # type: ignore[misc]  # tqdm has no types
        monitor_interval = 0  # no thread of its own

    Meter.set_lock(threading.RLock())  # its default lock creates semaphores for other processes
    return Meter(
        total=progress.total_bytes, initial=progress.done_bytes, file=io.StringIO(), mininterval=_REDRAW_S
    )


def _resolve(mode: Mode, stream: TextIO) -> Mode | Literal["terminal"]:
    if mode not in ("auto", "log"):
        return mode
    if stream.isatty() and os.environ.get("TERM", "") != "dumb":
        return "terminal"
    return "log" if mode == "log" else "plain"
