"""Progress that a person can see: lines in a log, or one line that is redrawn on a terminal."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from emb_model_provider.errors import FetchCancelledError
from emb_model_provider.hubs.base import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

log = logging.getLogger(__name__)

T = TypeVar("T")

_REDRAW_S = 0.2
_ASK_EVERY_S = 0.5
_END_S = 1.0
_PHASES = {"resolve": "Looking up", "download": "Downloading", "verify": "Verifying"}


class ByteCounter:
    """Adds up the bytes of files that are fetched side by side, and tells one total."""

    def __init__(self, repository: str, total_bytes: int, on_progress: Callable[[Progress], None]) -> None:
        self._repository = repository
        self._total = total_bytes
        self._done = 0
        self._lock = threading.Lock()
        self._on_progress = on_progress
        self._cancelled: FetchCancelledError | None = None

    def add(self, count: int) -> None:
        """Count bytes; fewer than none where a file is started again.

        Raises: FetchCancelledError once whoever is told has raised it, to every thread that brings bytes.
        """
        with self._lock:
            self.require_wanted()
            self._done = max(0, self._done + count)
            try:
                self._on_progress(
                    Progress("download", self._repository, min(self._done, self._total), self._total)
                )
            except FetchCancelledError as error:
                self._cancelled = error
                raise

    def ask(self) -> None:
        """Tell how far it is although nothing came, so that whoever is told can cancel what stands still.

        Raises: FetchCancelledError.
        """
        self.add(0)

    def cancel(self) -> None:
        """Let the threads that bring bytes end at the next one."""
        self._cancelled = self._cancelled or FetchCancelledError("The fetch was interrupted.")

    def require_wanted(self) -> None:
        """Raises: FetchCancelledError where the fetch was cancelled, whatever a client made of it since."""
        if self._cancelled is not None:
            raise self._cancelled


def results(futures: Sequence[Future[T]], counter: ByteCounter) -> list[T]:
    """Wait for the threads that bring files, and ask all the while whether these are still wanted.

    A client's threads cannot be interrupted while a hub sends nothing. When the fetch is cancelled or interrupted, they
    have a moment to end; one that does not is left behind, and ends at its next byte.

    Raises: what a thread raised; FetchCancelledError; KeyboardInterrupt.
    """
    try:
        waiting: set[Future[T]] = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=_ASK_EVERY_S, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            if waiting:
                counter.ask()
    except (FetchCancelledError, KeyboardInterrupt):
        counter.cancel()
        for future in futures:
            future.cancel()
        wait(futures, timeout=_END_S)
        raise
    return [future.result() for future in futures]


def bar_class(counter: ByteCounter | None) -> Any:
    """What the Hugging Face client takes for a progress bar: it draws nothing and counts bytes.

    The client asks for a class, makes an instance a file, and takes anything that has these methods.
    """

    class Bar:
        def __init__(self, *_: object, initial: int = 0, **__: object) -> None:
            self.update(initial)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, n: float | None = 1) -> None:
            if counter is not None and n:
                counter.add(int(n))

        # Bytes on the network, where they are not the file's own bytes (xet): the file's are what is counted.
        def update_transfer(self, n: float | None = 1) -> None: ...

        def set_postfix_str(self, *_: object, **__: object) -> None: ...

        def set_transfer_postfix_str(self, *_: object, **__: object) -> None: ...

        def close(self) -> None: ...

    return Bar


class Stop(BaseException):
    """Ends the threads of the ModelScope client. An Exception would be a reason for it to try again."""


def callback_class(counter: ByteCounter) -> Any:
    """What the ModelScope client takes for a progress callback: it makes an instance a file."""
    from modelscope_hub import ProgressCallback

    class Callback(ProgressCallback):
        def update(self, size: int) -> None:
            try:
                counter.add(size)
            except FetchCancelledError as error:
                raise Stop from error

    return Callback


class ProgressReporter:
    """A context manager that is called with each `Progress`, and shows some of them.

    On a terminal one line is redrawn. Anywhere else a line is logged at the start of a phase, and then
    whenever another tenth is done or `every_s` seconds have passed. When no byte arrives for `stall_s`
    seconds during a download, a warning says so, and again after each further `stall_s`.
    """

    def __init__(
        self, *, terminal: TextIO | None = None, every_s: float = 10.0, stall_s: float = 20.0
    ) -> None:
        """`terminal`: where to redraw a line; used only if it is a terminal, else lines are logged."""
        self._terminal = terminal if terminal is not None and terminal.isatty() else None
        self._every_s = every_s
        self._stall_s = stall_s
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None
        self._last: Progress | None = None
        self._moved_at = time.monotonic()
        self._warned_at = self._moved_at
        self._shown_at = 0.0
        self._shown_tenth = -1

    def __enter__(self) -> Self:
        self._watcher = threading.Thread(target=self._watch, name="progress-stall", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._watcher is not None:
            self._watcher.join()
        if self._terminal is not None and self._last is not None:
            self._terminal.write("\n")
            self._terminal.flush()

    def __call__(self, progress: Progress) -> None:
        with self._lock:
            now = time.monotonic()
            last, self._last = self._last, progress
            new_phase = last is None or (last.phase, last.repository) != (progress.phase, progress.repository)
            if new_phase or last is None or last.done_bytes != progress.done_bytes:
                self._moved_at = self._warned_at = now
            tenth = progress.done_bytes * 10 // progress.total_bytes if progress.total_bytes else 0
            if self._terminal is not None:
                if new_phase or tenth == 10 or now - self._shown_at >= _REDRAW_S:
                    self._shown_at = now
                    self._terminal.write(f"\r\x1b[2K{describe(progress)}")
                    self._terminal.flush()
            elif new_phase or tenth > self._shown_tenth or now - self._shown_at >= self._every_s:
                self._shown_at, self._shown_tenth = now, tenth
                log.info("%s", describe(progress))

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._stall_s / 4)):
            with self._lock:
                now = time.monotonic()
                last = self._last
                if last is None or last.phase != "download" or now - self._warned_at < self._stall_s:
                    continue
                self._warned_at = now
                silent_s = now - self._moved_at
            log.warning("%s: no bytes for %.0f s; still waiting.", last.repository, silent_s)


def describe(progress: Progress) -> str:
    """One line for a person: `Downloading owner/name: 12.0 of 90.9 MB (13 %)`."""
    line = f"{_PHASES[progress.phase]} {progress.repository}"
    if not progress.total_bytes:
        return line
    percent = progress.done_bytes * 100 // progress.total_bytes
    return f"{line}: {progress.done_bytes / 1e6:.1f} of {progress.total_bytes / 1e6:.1f} MB ({percent} %)"
