"""Log lines: to the terminal and to a rotated file, with the id of the request they belong to.

Lines are handed to a thread that writes them: a slow disk or terminal does not hold up a request. Access lines are
written with others that gather within a twentieth of a second, because waking that thread for each of them takes
longer than tokenizing a short text. All other lines are written at once.
"""

from __future__ import annotations

import copy
import json
import logging
import logging.handlers
import random
import sys
import threading
import time
import traceback
from collections import deque
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from emb_model_provider.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from emb_model_provider.settings import LogSettings

ACCESS_LOGGER = "emb_model_provider.access"
LOG_FILE = "emb_model_provider.log"
request_id: ContextVar[str] = ContextVar("request_id", default="-")


def new_request_id() -> str:
    """Return an id for a request that came without one. It tells requests apart, and keeps no secret."""
    # The system's random source lets go of the interpreter's lock: under load each call would cost a thread switch.
    return f"req_{random.getrandbits(96):024x}"


_MAX_FILE_BYTES = 20 * 1024 * 1024
_MAX_FILE_AGE_S = 24 * 3600.0
_KEPT_FILES = 7
_GATHER_S = 0.05


def start_logging(settings: LogSettings) -> LineWriter:
    """Send all log lines of this process where the settings say; return what to `stop()` at the end.

    Raises: SettingsError where the log file cannot be written.
    """
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    handlers: list[logging.StreamHandler[Any]] = [logging.StreamHandler(sys.stderr)]
    if settings.log_to_file:
        handlers.append(_file_handler(settings))
    for handler in handlers:
        handler.setFormatter(_JsonFormatter() if as_json else _TextFormatter())

    writer = LineWriter(handlers)
    root = logging.getLogger()
    root.handlers = [_Enqueue(writer)]  # type: ignore[arg-type]  # all that it asks of a queue is `put_nowait`
    root.setLevel(logging.WARNING)
    logging.getLogger("emb_model_provider").setLevel(settings.log_level)
    logging.captureWarnings(capture=True)
    # No line tells them, and looking them up for every access line costs as much as writing it.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    return writer


def _file_handler(settings: LogSettings) -> _AgedRotatingFileHandler:
    try:
        settings.log_dir.mkdir(parents=True, exist_ok=True)
        return _AgedRotatingFileHandler(
            settings.log_dir / LOG_FILE,
            max_bytes=_MAX_FILE_BYTES,
            max_age_s=_MAX_FILE_AGE_S,
            kept=_KEPT_FILES,
        )
    except OSError as error:
        raise SettingsError(
            f"EMB_PROVIDER_LOG_DIR={settings.log_dir}: cannot be written ({error.strerror}): "
            "choose another directory, or set EMB_PROVIDER_LOG_TO_FILE=false."
        ) from error


class LineWriter:
    """The thread that writes, and the lines that wait for it."""

    def __init__(self, handlers: Sequence[logging.StreamHandler[Any]]) -> None:
        self._handlers = handlers
        self._lines: deque[logging.LogRecord] = deque()
        self._some = threading.Event()
        self._urgent = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def put_nowait(self, record: logging.LogRecord) -> None:
        """Take a line. Called by the logging handler, on any thread."""
        self._lines.append(record)
        if record.name != ACCESS_LOGGER:
            self._urgent.set()
        if not self._some.is_set():
            self._some.set()

    def stop(self) -> None:
        """Write what is left, and close the files."""
        self._stopping = True
        self._urgent.set()
        self._some.set()
        self._thread.join()
        for handler in self._handlers:
            handler.close()

    def _run(self) -> None:
        while not self._stopping or self._lines:
            self._some.wait()
            self._urgent.wait(_GATHER_S)
            # Cleared before the lines are taken: what comes from here on wakes us again.
            self._some.clear()
            self._urgent.clear()
            batch = [self._lines.popleft() for _ in range(len(self._lines))]
            if not batch:
                continue
            for handler in self._handlers:
                _write(handler, batch)


def _write(handler: logging.StreamHandler[Any], records: Sequence[logging.LogRecord]) -> None:
    try:
        for record in records:
            line = f"{handler.format(record)}\n"
            if isinstance(handler, _AgedRotatingFileHandler):
                handler.make_room(line, record.created)
            handler.stream.write(line)
        handler.flush()
    except Exception:  # noqa: BLE001 - as logging itself: what cannot be written must not end the service
        handler.handleError(records[-1])


class _AgedRotatingFileHandler(logging.handlers.RotatingFileHandler):
    """Begins a new file when the present one is too large or too old."""

    def __init__(self, file: Path, *, max_bytes: int, max_age_s: float, kept: int) -> None:
        # What an earlier process left counts from its last line: nothing tells when its first was written.
        self._begun = file.stat().st_mtime if file.exists() else time.time()
        self._size = file.stat().st_size if file.exists() else 0
        self._max_age_s = max_age_s
        super().__init__(file, maxBytes=max_bytes, backupCount=kept, encoding="utf-8")

    def make_room(self, line: str, created: float) -> None:
        """Begin a new file where the present one is too old or has no room for `line`; else count it in."""
        size = len(line.encode())
        if (self._size and self._size + size > self.maxBytes) or created - self._begun > self._max_age_s:
            self.doRollover()
            self._begun, self._size = time.time(), 0
        self._size += size


class _Enqueue(logging.handlers.QueueHandler):
    """Finishes a record while still in its request's context: message, traceback and request id are text then.

    Whatever a message quotes, it stays one line: nobody writes log lines of their own choosing.
    """

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        finished = copy.copy(record)
        finished.msg, finished.args = _printable(record.getMessage().rstrip("\n")), None
        finished.request_id = request_id.get()
        finished.traceback = _traceback(record)
        finished.exc_info = finished.exc_text = finished.stack_info = None
        return finished


def _traceback(record: logging.LogRecord) -> list[str]:
    if not record.exc_info:
        return []
    text = "".join(traceback.format_exception(*record.exc_info))
    return [_printable(line) for line in text.rstrip("\n").split("\n")]


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        identifier = getattr(record, "request_id", "-")
        if identifier != "-":
            line = f"{line} request_id={identifier}"
        return "\n    ".join([line, *getattr(record, "traceback", [])])


class _JsonFormatter(logging.Formatter):
    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        identifier = getattr(record, "request_id", "-")
        if identifier != "-":
            fields["request_id"] = identifier
        lines = getattr(record, "traceback", [])
        if lines:
            fields["traceback"] = "\n".join(lines)
        return json.dumps(fields | getattr(record, "fields", {}), ensure_ascii=False)
