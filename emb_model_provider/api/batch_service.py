"""The files and batches of the service, and the worker that answers them."""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emb_model_provider.batch_jobs.pending import has_unfinished_batches
from emb_model_provider.batch_jobs.types import Limits, WorkerOptions
from emb_model_provider.errors import ProviderError
from emb_model_provider.formatting import describe_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.batch_jobs.batches import BatchFigures, BatchStore
    from emb_model_provider.batch_jobs.files import FileStore
    from emb_model_provider.batch_jobs.types import Calculator
    from emb_model_provider.batch_jobs.worker import BatchWorker
    from emb_model_provider.settings import Settings

logger = logging.getLogger(__name__)

_OPEN_AGAIN_S = 5.0
"""How often a database is tried again that could not be opened at the start."""
_DAY_S = 24 * 3600
_STOP_S = 8.0
"""How long the worker may take at shutdown to return its work."""
_FIGURES_S = 5.0
"""How old the figures in the metrics may be."""
_FIGURES_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class OpenBatches:
    """The stores of an opened database, and the worker."""

    files: FileStore
    batches: BatchStore
    worker: BatchWorker


@dataclass(frozen=True, slots=True)
class StoredFigures:
    """What the database holds."""

    batches: BatchFigures
    file_bytes: int


class BatchService:
    """Opens the database when it is first used, because a service without batches must not pay for it.

    At the start it is opened if there are unfinished batches, or if other services can create some in the same database.
    Used on the event loop.
    """

    def __init__(self, settings: Settings, create_calculator: Callable[[], Calculator]) -> None:
        self._settings = settings
        self._create_calculator = create_calculator
        self._lock = asyncio.Lock()
        self._opened: OpenBatches | None = None
        self._starting: asyncio.Task[None] | None = None
        self._working: asyncio.Task[None] | None = None
        self._figures: StoredFigures | None = None
        self._figures_at = float("-inf")
        self._is_stopped = False

    async def start(self) -> None:
        """Continue the unfinished batches, if there are any."""
        settings = self._settings
        if not settings.batch_jobs.batches:
            return
        is_shared = settings.batch_jobs.database_url is not None
        if is_shared or await asyncio.to_thread(has_unfinished_batches, settings.batch_directory):
            self._starting = asyncio.create_task(self._open_until_it_works())

    async def stop(self) -> None:
        """Stop the worker, which returns what it has not finished to the database."""
        if self._starting is not None:
            self._starting.cancel()
        async with self._lock:
            self._is_stopped = True
            if self._working is not None:
                self._working.cancel()
                await asyncio.wait({self._working}, timeout=_STOP_S)
            if self._opened is not None:
                self._opened.batches.engine.dispose()

    async def open(self) -> OpenBatches:
        """Return the stores. Raises the errors of `open_database`."""
        if self._opened is None:
            async with self._lock:
                if self._opened is None:
                    self._opened = await asyncio.to_thread(self._open)
                    if not self._is_stopped:
                        # Not in the context of the request that opens it. Otherwise all log lines would have its request id.
                        work = self._work(self._opened.worker)
                        self._working = asyncio.create_task(work, context=Context())
        return self._opened

    @property
    def is_open(self) -> bool:
        """Whether the database has been opened."""
        return self._opened is not None

    def wake(self) -> None:
        """Tell the worker that there is something to do."""
        if self._opened is not None:
            self._opened.worker.wake()

    async def figures(self) -> StoredFigures | None:
        """Return what the database holds, some seconds ago at most if it answers; None if it has not been opened."""
        opened, now = self._opened, asyncio.get_running_loop().time()
        if opened is not None and now - self._figures_at > _FIGURES_S:
            self._figures_at = now
            reading = asyncio.to_thread(lambda: StoredFigures(opened.batches.figures(), opened.files.total_bytes()))
            try:
                self._figures = await asyncio.wait_for(reading, _FIGURES_TIMEOUT_S)
            except (ProviderError, TimeoutError) as error:  # the last ones are still shown
                logger.warning("the figures of batches could not be read: %s", describe_error(error))
        return self._figures

    def _open(self) -> OpenBatches:
        from emb_model_provider.batch_jobs.batches import BatchStore
        from emb_model_provider.batch_jobs.database import open_database
        from emb_model_provider.batch_jobs.files import FileStore
        from emb_model_provider.batch_jobs.worker import BatchWorker

        settings = self._settings
        url = settings.batch_jobs.database_url
        directory = settings.batch_directory
        engine = open_database(url.get_secret_value() if url is not None else None, directory)
        of_jobs = settings.batch_jobs
        files = FileStore(engine, directory, max_bytes=of_jobs.max_file_bytes)
        batches = BatchStore(engine, files, max_unfinished=of_jobs.max_unfinished_batches)
        limits = Limits(max_line_bytes=settings.limits.max_body_bytes)
        days = of_jobs.batch_retention_days
        options = WorkerOptions(retention_s=days * _DAY_S if days is not None else None)
        worker = BatchWorker(batches, directory, self._create_calculator(), limits=limits, options=options)
        return OpenBatches(files, batches, worker)

    async def _work(self, worker: BatchWorker) -> None:
        while True:
            try:
                await worker.run()
            except Exception:
                logger.exception("the worker of batches failed, and is started again")
                await asyncio.sleep(_OPEN_AGAIN_S)

    async def _open_until_it_works(self) -> None:
        reported = ""
        while True:
            try:
                await self.open()
            except ProviderError as error:
                if error.message != reported:
                    logger.warning("batches wait: %s", error.message)
                reported = error.message
                await asyncio.sleep(_OPEN_AGAIN_S)
            else:
                return
