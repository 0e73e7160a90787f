"""How far a command has come, on stderr: a line that is redrawn on a terminal, lines elsewhere, or JSON."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TextIO

from emb_model_provider.formatting import format_duration, format_size

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from emb_model_provider.hubs.base import Progress

Mode = Literal["auto", "plain", "json", "none"]
Phase = Literal["resolve", "download", "verify", "compile", "compare", "load", "ready"]

_REDRAW_S = 0.2
_SPEED_OVER_S = 10.0
_MAKING = ("import", "load", "read", "export", "trace", "convert", "quantize")
"""How the names of the compile step's phases begin before it compares what it made with the reference."""
_COMPILING = "emb_model_provider.artifacts.compiler_process"


@dataclass(frozen=True, slots=True)
class _State:
    phase: Phase
    done: int = 0
    total: int | None = None


class Reporter:
    """Shows what happens to one model after the other. A context manager; called with each `Progress` of a fetch.

    While it is open, warnings of the package's and the hubs' loggers are shown as lines of their own, and the compile
    step's own phases are taken from its log. It may be called from any thread.
    """

    def __init__(
        self,
        mode: Mode,
        *,
        stream: TextIO | None = None,
        every_s: float = 10.0,
        stall_s: float = 20.0,
    ) -> None:
        """`stream` is stderr where it is None. Unless `mode` is none, a download without a byte for `stall_s` says so."""
        self._stream = stream if stream is not None else sys.stderr
        self.mode: Mode | Literal["terminal"] = _resolved(mode, self._stream)
        self._every_s = every_s
        self._stall_s = stall_s
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._handler = _Notes(self)
        self._levels: dict[str, int] = {}
        self._model = ""
        self._state: _State | None = None
        self._began = self._moved_at = self._stalled_at = self._shown_at = time.monotonic()
        self._samples: deque[tuple[float, int]] = deque()
        self._shown_tenth = -1
        self._drawn = False

    def __enter__(self) -> Self:
        root = logging.getLogger()
        root.addHandler(self._handler)
        for name in ("emb_model_provider", _COMPILING):
            self._levels[name] = logging.getLogger(name).level
        logging.getLogger("emb_model_provider").setLevel(logging.WARNING)
        logging.getLogger(_COMPILING).setLevel(logging.DEBUG)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._watcher.join()
        logging.getLogger().removeHandler(self._handler)
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
        with self._lock:
            self._clear()

    # --- what is told ---------------------------------------------------------------------------------

    def model(self, name: str) -> None:
        """All that follows is about this model."""
        with self._lock:
            self._model, self._state = name, None

    def __call__(self, progress: Progress) -> None:
        """Take how far a fetch has come."""
        with self._lock:
            self._model = self._model or progress.repository
            self._advance(_State(progress.phase, progress.done_bytes, progress.total_bytes))

    def phase(self, phase: Phase) -> None:
        """Say that a phase without bytes begins."""
        with self._lock:
            if self._state is None or self._state.phase != phase:
                self._advance(_State(phase))

    def note(self, text: str) -> None:
        """Show a line that stays."""
        with self._lock:
            self._clear()
            if self.mode == "json":
                self._write(json.dumps({"model": self._model, "note": text}) + "\n")
            else:
                self._write(text + "\n")

    # --- what is shown --------------------------------------------------------------------------------

    def _advance(self, state: _State) -> None:
        now, last = time.monotonic(), self._state
        self._state = state
        begins = last is None or last.phase != state.phase
        if begins:
            self._began, self._shown_tenth = now, -1
            self._samples.clear()
        if begins or last is None or last.done != state.done:
            self._moved_at = self._stalled_at = now
            self._samples.append((now, state.done))
            while len(self._samples) > 2 and now - self._samples[0][0] > _SPEED_OVER_S:
                self._samples.popleft()
        tenth = state.done * 10 // state.total if state.total else 0
        if self.mode == "terminal":
            due = (
                begins or now - self._shown_at >= _REDRAW_S or bool(state.total and state.done == state.total)
            )
        else:
            due = begins or tenth > self._shown_tenth or now - self._shown_at >= self._every_s
        if due:
            self._shown_at, self._shown_tenth = now, tenth
            self._show(state, now)

    def _show(self, state: _State, now: float) -> None:
        if self.mode == "none":
            return
        speed = self._speed()
        left = (
            (state.total - state.done) / speed
            if state.total and speed and state.phase == "download"
            else None
        )
        if self.mode == "json":
            line = {
                "model": self._model,
                "phase": state.phase,
                "done_bytes": state.done if state.total else None,
                "total_bytes": state.total,
                "bytes_per_s": round(speed) if speed else None,
                "seconds_left": round(left) if left is not None else None,
            }
            self._write(json.dumps(line) + "\n")
            return
        text = describe(self._model, state.phase, state.done, state.total, speed, left, now - self._began)
        if self.mode == "plain":
            self._write(text + "\n")
            return
        width = shutil.get_terminal_size().columns - 1
        self._write(f"\r\x1b[2K{text[:width]}")
        self._drawn = True

    def _speed(self) -> float | None:
        """Return bytes a second over the last seconds; None where nothing arrives."""
        if len(self._samples) < 2 or self._state is None or self._state.phase != "download":
            return None
        (then, before), (_, after) = self._samples[0], self._samples[-1]
        took = time.monotonic() - then
        return (after - before) / took if took > 0 and after > before else None

    def _watch(self) -> None:
        """Redraw what takes long without a word, and say that nothing arrives."""
        while not self._stop.wait(min(1.0, self._stall_s / 4)):
            with self._lock:
                state, now = self._state, time.monotonic()
                if state is None or self.mode == "none":
                    continue
                if state.phase == "download" and state.total and now - self._stalled_at >= self._stall_s:
                    self._stalled_at = now
                    self.note(f"{self._model}: no bytes for {now - self._moved_at:.0f} s, still trying")
                due = self.mode == "terminal" or now - self._shown_at >= self._every_s
                if due and state.phase != "ready":
                    self._shown_at = now
                    self._show(state, now)

    def _clear(self) -> None:
        if self._drawn:
            self._write("\r\x1b[2K")
            self._drawn = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class _Notes(logging.Handler):
    """Turns log records into notes, and the compile step's phases into ours."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.DEBUG)
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        compiling = getattr(record, "compile_phase", None)
        if compiling is not None:
            self._reporter.phase("compile" if str(compiling).startswith(_MAKING) else "compare")
        elif record.levelno >= logging.WARNING:
            self._reporter.note(f"warning: {record.getMessage()}")


def describe(
    model: str,
    phase: Phase,
    done: int,
    total: int | None,
    speed: float | None,
    left_s: float | None,
    elapsed_s: float,
) -> str:
    """Return one line: `acme/model: download 12.0 MB of 90.9 MB (13 %), 4.1 MB/s, 0:19 left`."""
    line = f"{model}: {phase}"
    if total:
        line += f" {format_size(done)} of {format_size(total)} ({done * 100 // total} %)"
        if speed:
            line += f", {format_size(speed)}/s"
        if left_s is not None:
            line += f", {format_duration(left_s)} left"
    elif elapsed_s >= 1 and phase != "ready":
        line += f", {format_duration(elapsed_s)}"
    return line


def _resolved(mode: Mode, stream: TextIO) -> Mode | Literal["terminal"]:
    if mode != "auto":
        return mode
    dumb = os.environ.get("TERM", "") == "dumb"
    return "terminal" if stream.isatty() and not dumb else "plain"
