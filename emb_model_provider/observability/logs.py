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
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING

from emb_model_provider.errors import SettingsError
from emb_model_provider.observability.log_file import LogFile, Rotation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emb_model_provider.observability.metrics import RequestRecord
    from emb_model_provider.settings import LogSettings

ACCESS_LOGGER = "emb_model_provider.access"
LOG_FILE = "emb_model_provider.log"
logger = logging.getLogger(__name__)
_access_logger = logging.getLogger(ACCESS_LOGGER)

request_id: ContextVar[str] = ContextVar("request_id", default="-")

_COLLECT_S = 0.05


def new_request_id() -> str:
    """Return an id for a request without one. It is unique, but not secret."""
    # Not os.urandom, because that releases the GIL, and under load each call would cost a thread switch.
    return f"req_{random.getrandbits(96):024x}"


def log_request(record: RequestRecord, level: int) -> None:
    """Write a line of the access log."""
    if _access_logger.isEnabledFor(level):
        # Without `log`, which looks for its caller: that takes as long as the rest.
        line = logging.LogRecord(ACCESS_LOGGER, level, __file__, 0, _AccessLine(record), None, None)
        line.request_id = record.request_id
        _access_logger.handle(line)


def start_logging(settings: LogSettings, rotation: Rotation | None = None, *, worker: int = 0) -> LineWriter:
    """Write all log lines of this process as the settings say; call `stop` of the result before the process ends.

    Of several workers each has a log file of its own, because two processes that rotate one file lose lines.

    Raises:
        SettingsError: The log file cannot be written, although a setting asks for it.
    """
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    file, problem = _open_file(settings, rotation or Rotation(), worker) if settings.log_to_file else (None, "")
    writer = LineWriter(_JsonFormatter() if as_json else _TextFormatter(), file)
    root = logging.getLogger()
    root.handlers = [_Enqueue(writer)]  # type: ignore[arg-type]  # it only calls `put_nowait`
    root.setLevel(logging.WARNING)
    logging.getLogger("emb_model_provider").setLevel(settings.log_level)
    logging.captureWarnings(capture=True)
    # Disabled, because no format uses them, and looking them up takes as long as writing a line of the access log.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if problem:
        logger.warning("%s", problem)
    return writer


def log_file_name(worker: int) -> str:
    """Return the name of the log file of a worker. That of the first one is the same as without workers."""
    return LOG_FILE if worker == 0 else LOG_FILE.replace(".log", f".worker-{worker}.log")


def _open_file(settings: LogSettings, rotation: Rotation, worker: int) -> tuple[LogFile | None, str]:
    """Return the log file, or None and the reason if only the default asks for one and it cannot be written."""
    try:
        return LogFile(settings.log_dir / log_file_name(worker), rotation), ""
    except OSError as error:
        problem = f"EMB_PROVIDER_LOG_DIR={settings.log_dir}: the directory cannot be written ({error.strerror})"
        if {"log_dir", "log_to_file"} & settings.model_fields_set:
            raise SettingsError(
                f"{problem}. Choose another directory, or set EMB_PROVIDER_LOG_TO_FILE=false."
            ) from error
        return None, (
            f"{problem}: there is no log file, only these lines. To write one, set EMB_PROVIDER_LOG_DIR to another "
            "directory; otherwise EMB_PROVIDER_LOG_TO_FILE=false."
        )


class _AccessLine:
    """The message of a line of the access log, formatted by the thread that writes it."""

    __slots__ = ("_record",)

    def __init__(self, record: RequestRecord) -> None:
        self._record = record

    def __str__(self) -> str:
        record = self._record
        line = " ".join(f"{name}={value}" for name, value in self.fields().items())
        return _printable(f"{record.method} {record.path[:200]} {line}")

    def fields(self) -> dict[str, object]:
        """Return the values of the line by their names, for the log in JSON."""
        record = self._record
        fields: dict[str, object] = {"status": record.status, "ms": _milliseconds(record.duration_s)}
        if record.model:
            fields["model"] = record.model
        if record.tokenize_s is not None:
            fields |= {
                "inputs": record.inputs,
                "tokens": record.tokens,
                "queue_ms": _milliseconds(record.queue_s or 0.0),
                "tokenize_ms": _milliseconds(record.tokenize_s),
                "inference_ms": _milliseconds(record.inference_s or 0.0),
            }
        return fields


class LineWriter:
    """The thread that writes log lines, and the queue of lines."""

    def __init__(self, formatter: logging.Formatter, file: LogFile | None) -> None:
        self._formatter = formatter
        self._file = file
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
        """Write the remaining lines, and close the file."""
        self._stopping = True
        self._urgent.set()
        self._available.set()
        self._thread.join()
        if self._file is not None:
            self._file.close()

    def _run(self) -> None:
        while not self._stopping or self._lines:
            self._available.wait()
            self._urgent.wait(_COLLECT_S)
            # Cleared before the lines are taken, so that a line that is queued meanwhile wakes the thread again.
            self._available.clear()
            self._urgent.clear()
            if batch := [self._lines.popleft() for _ in range(len(self._lines))]:
                lines = [(self._formatter.format(record), record.created) for record in batch]
                self._write_to_stderr([line for line, _ in lines])
                if self._file is not None:
                    self._write_to_file(self._file, lines)

    def _write_to_stderr(self, lines: Sequence[str]) -> None:
        # The terminal or pipe may be closed, or its disk full: there is nowhere to report that.
        with suppress(OSError, ValueError):
            sys.stderr.write("\n".join([*lines, ""]))
            sys.stderr.flush()

    def _write_to_file(self, file: LogFile, lines: Sequence[tuple[str, float]]) -> None:
        before = file.problem
        file.write(lines)
        if file.problem == before:
            return
        level, message = logging.WARNING, f"the log file {file.path} {file.problem}"
        if not file.problem:
            level, message = logging.INFO, f"the log file {file.path} works again"
        if file.missing:
            message += f"; up to {file.missing} lines are missing in it"
        record = logger.makeRecord(logger.name, level, __file__, 0, message, (), None)
        line = self._formatter.format(record)
        self._write_to_stderr([line])
        if not file.problem:
            file.write([(line, record.created)])


class _Enqueue(logging.handlers.QueueHandler):
    """Converts message, traceback and request id to text on the thread of the request, and queues the record.

    Lines of the access log are queued as they are, because nothing changes their values.

    A message is escaped to one line, so that no client can forge log lines.
    """

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        if isinstance(record.msg, _AccessLine):
            return record
        prepared = copy.copy(record)
        prepared.msg, prepared.args = _printable(record.getMessage().rstrip("\n")), None
        prepared.request_id = request_id.get()
        prepared.traceback = []
        if record.exc_info:
            lines = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n").split("\n")
            prepared.traceback = [_printable(line) for line in lines]
        prepared.exc_info = prepared.exc_text = prepared.stack_info = None
        return prepared


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 2)


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
        fields: dict[str, object] = {
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
        if isinstance(record.msg, _AccessLine):
            fields |= record.msg.fields()
        return json.dumps(fields, ensure_ascii=False, default=str)
