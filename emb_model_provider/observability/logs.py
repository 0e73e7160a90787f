"""Writes log lines to stderr and to a rotated file, with the id of the request that they belong to.

A thread writes the lines, so that a slow disk or terminal does not delay requests. Lines of the access log are
collected for 50 ms, because waking the thread for each of them takes longer than tokenizing a short text. Other lines
are written at once.
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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emb_model_provider.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from emb_model_provider.settings import LogSettings

ACCESS_LOGGER = "emb_model_provider.access"
LOG_FILE = "emb_model_provider.log"
request_id: ContextVar[str] = ContextVar("request_id", default="-")

_COLLECT_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """When a new log file is started, and how many old ones are kept."""

    max_bytes: int = 20 * 1024 * 1024
    max_age_s: float = 24 * 3600.0
    kept_files: int = 7


def new_request_id() -> str:
    """Return an id for a request without one. It is unique, but not secret."""
    # Not os.urandom, because that releases the GIL, and under load each call would cost a thread switch.
    return f"req_{random.getrandbits(96):024x}"


def start_logging(settings: LogSettings, rotation: Rotation | None = None) -> LineWriter:
    """Write all log lines of this process as the settings say; call `stop` of the result before the process ends."""
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    handlers: list[logging.StreamHandler[Any]] = [logging.StreamHandler(sys.stderr)]
    if settings.log_to_file:
        handlers.append(_file_handler(settings, rotation or Rotation()))
    for handler in handlers:
        handler.setFormatter(_JsonFormatter() if as_json else _TextFormatter())

    writer = LineWriter(handlers)
    root = logging.getLogger()
    root.handlers = [_Enqueue(writer)]  # type: ignore[arg-type]  # it only calls `put_nowait`
    root.setLevel(logging.WARNING)
    logging.getLogger("emb_model_provider").setLevel(settings.log_level)
    logging.captureWarnings(capture=True)
    # Disabled, because no format uses them, and looking them up takes as long as writing a line of the access log.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    return writer


class LineWriter:
    """The thread that writes log lines, and the queue of lines."""

    def __init__(self, handlers: Sequence[logging.StreamHandler[Any]]) -> None:
        self._handlers = handlers
        self._lines: deque[logging.LogRecord] = deque()
        self._available = threading.Event()
        self._urgent = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def put_nowait(self, record: logging.LogRecord) -> None:
        """Queue a line. Called by the logging handler on any thread."""
        self._lines.append(record)
        if record.name != ACCESS_LOGGER:
            self._urgent.set()
        if not self._available.is_set():
            self._available.set()

    def stop(self) -> None:
        """Write the remaining lines, and close the files."""
        self._stopping = True
        self._urgent.set()
        self._available.set()
        self._thread.join()
        for handler in self._handlers:
            handler.close()

    def _run(self) -> None:
        while not self._stopping or self._lines:
            self._available.wait()
            self._urgent.wait(_COLLECT_S)
            # Cleared before the lines are taken, so that a line that is queued meanwhile wakes the thread again.
            self._available.clear()
            self._urgent.clear()
            if batch := [self._lines.popleft() for _ in range(len(self._lines))]:
                for handler in self._handlers:
                    _write(handler, batch)


def _file_handler(settings: LogSettings, rotation: Rotation) -> _RotatingFileHandler:
    directory = settings.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return _RotatingFileHandler(directory / LOG_FILE, rotation)
    except OSError as error:
        raise SettingsError(
            f"EMB_PROVIDER_LOG_DIR={directory}: the directory cannot be written ({error.strerror}). "
            "Choose another directory, or set EMB_PROVIDER_LOG_TO_FILE=false."
        ) from error


def _write(handler: logging.StreamHandler[Any], records: Sequence[logging.LogRecord]) -> None:
    try:
        for record in records:
            line = f"{handler.format(record)}\n"
            if isinstance(handler, _RotatingFileHandler):
                handler.rotate_if_due(line, record.created)
            handler.stream.write(line)
        handler.flush()
    except Exception:  # noqa: BLE001 - as in logging: an error in the log must not end the service
        handler.handleError(records[-1])


class _RotatingFileHandler(logging.handlers.RotatingFileHandler):
    """Starts a new file when the current one is too large or too old."""

    def __init__(self, file: Path, rotation: Rotation) -> None:
        # The age of an existing file is counted from its last line, because the time of its first line is unknown.
        self._started = file.stat().st_mtime if file.exists() else time.time()
        self._size = file.stat().st_size if file.exists() else 0
        self._max_age_s = rotation.max_age_s
        super().__init__(file, maxBytes=rotation.max_bytes, backupCount=rotation.kept_files, encoding="utf-8")

    def rotate_if_due(self, line: str, created: float) -> None:
        """Start a new file if the current one is too old or has no room for a line, and add the size of the line."""
        size = len(line.encode())
        if (self._size and self._size + size > self.maxBytes) or created - self._started > self._max_age_s:
            self.doRollover()
            self._started, self._size = time.time(), 0
        self._size += size


class _Enqueue(logging.handlers.QueueHandler):
    """Converts message, traceback and request id to text on the thread of the request, and queues the record.

    A message is escaped to one line, so that no client can forge log lines.
    """

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        prepared = copy.copy(record)
        prepared.msg, prepared.args = _printable(record.getMessage().rstrip("\n")), None
        prepared.request_id = request_id.get()
        prepared.traceback = []
        if record.exc_info:
            lines = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n").split("\n")
            prepared.traceback = [_printable(line) for line in lines]
        prepared.exc_info = prepared.exc_text = prepared.stack_info = None
        return prepared


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
