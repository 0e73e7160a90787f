"""Progress of commands on stderr, with the warnings of the package between its lines."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from emb_model_provider.progress import ProgressReporter

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


class CommandProgress(ProgressReporter):
    """A progress reporter that also shows log records of level WARNING and above, as notes."""

    def __enter__(self) -> Self:
        self._handler = _NoteHandler(self)
        package = logging.getLogger("emb_model_provider")
        self._level = package.level
        package.setLevel(logging.WARNING)
        logging.getLogger().addHandler(self._handler)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger().removeHandler(self._handler)
        logging.getLogger("emb_model_provider").setLevel(self._level)
        super().__exit__(kind, error, trace)


class _NoteHandler(logging.Handler):
    def __init__(self, reporter: ProgressReporter) -> None:
        super().__init__(logging.WARNING)
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self._reporter.note(f"warning: {record.getMessage()}")
