"""Log lines: to the terminal and to a rotated file, with the id of the request they belong to.

Lines are handed to a thread that writes them: a slow disk or terminal does not hold up a request.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import sys
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

from emb_model_provider.errors import SettingsError

if TYPE_CHECKING:
    from emb_model_provider.settings import LogSettings

LOG_FILE = "emb_model_provider.log"
request_id: ContextVar[str] = ContextVar("request_id", default="-")

_MAX_FILE_BYTES = 20 * 1024 * 1024
_MAX_FILE_AGE_S = 24 * 3600.0
_KEPT_FILES = 7


def start_logging(settings: LogSettings) -> logging.handlers.QueueListener:
    """Send all log lines of this process where the settings say; return what to `stop()` at the end.

    Raises: SettingsError where the log file cannot be written.
    """
    as_json = settings.format == "json" or (settings.format == "auto" and not sys.stderr.isatty())
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if settings.to_file:
        handlers.append(_file_handler(settings))
    for handler in handlers:
        handler.setFormatter(_JsonFormatter() if as_json else _TextFormatter())

    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener = logging.handlers.QueueListener(lines, *handlers)
    root = logging.getLogger()
    root.handlers = [_Enqueue(lines)]
    root.setLevel(logging.WARNING)
    logging.getLogger("emb_model_provider").setLevel(settings.level)
    logging.captureWarnings(capture=True)
    listener.start()
    return listener


def _file_handler(settings: LogSettings) -> logging.Handler:
    try:
        settings.directory.mkdir(parents=True, exist_ok=True)
        return _AgedRotatingFileHandler(
            settings.directory / LOG_FILE, maxBytes=_MAX_FILE_BYTES, backupCount=_KEPT_FILES, encoding="utf-8"
        )
    except OSError as error:
        raise SettingsError(
            f"EMB_PROVIDER_LOG_DIR={settings.directory}: cannot be written ({error.strerror}): "
            "choose another directory, or set EMB_PROVIDER_LOG_TO_FILE=false."
        ) from error


class _AgedRotatingFileHandler(logging.handlers.RotatingFileHandler):
    """Begins a new file when the present one is too large or too old."""

    _begun = time.time()

    def shouldRollover(self, record: logging.LogRecord) -> bool:  # noqa: N802 - the standard library's name
        return bool(super().shouldRollover(record)) or record.created - self._begun > _MAX_FILE_AGE_S

    def doRollover(self) -> None:  # noqa: N802 - the standard library's name
        super().doRollover()
        self._begun = time.time()


class _Enqueue(logging.handlers.QueueHandler):
    """Stamps a record with its request's id while still in the request's context."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        record.request_id = request_id.get()
        record = super().prepare(record)
        # Whatever a message quotes, it stays one line: nobody writes log lines of their own choosing.
        record.msg = record.message = _printable(str(record.msg))
        return record


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
        return line if identifier == "-" else f"{line} request_id={identifier}"


class _JsonFormatter(logging.Formatter):
    converter = time.gmtime

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
        return json.dumps(fields | getattr(record, "fields", {}), ensure_ascii=False)
