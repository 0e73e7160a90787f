"""The worker: validates, computes and finalizes batches, until it is cancelled.

Computing a chunk writes a segment and then records it in one transaction. Whatever ends the process, each line is in the
files of its batch exactly once; only chunks that were in progress are computed again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import socket
import threading
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from emb_model_provider.batch_jobs.computing import Computation
from emb_model_provider.batch_jobs.files import DEFAULT_EXPIRY_S
from emb_model_provider.batch_jobs.lines import (
    answered_line,
    crash_body,
    error_body,
    line_id,
    read_chunk,
    unanswered_line,
    validate_file,
)
from emb_model_provider.batch_jobs.segments import SegmentStore
from emb_model_provider.batch_jobs.types import Answer, Limits, WorkerOptions
from emb_model_provider.batch_jobs.work import BatchLease, ChunkLease, Ending, Results, WorkStore
from emb_model_provider.concurrency import Turns, run_in_daemon_thread
from emb_model_provider.errors import DatabaseUnavailableError, RetryLaterError, StorageFullError
from emb_model_provider.formatting import describe_error, format_size, printable
from emb_model_provider.snapshots.locks import try_lock_exclusive

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from emb_model_provider.batch_jobs.batches import BatchStore
    from emb_model_provider.batch_jobs.files import StoredFile, Upload
    from emb_model_provider.batch_jobs.lines import InputLine
    from emb_model_provider.batch_jobs.segments import Segment
    from emb_model_provider.batch_jobs.types import Calculator
    from emb_model_provider.batch_jobs.work import ChunkResult, Lease
    from emb_model_provider.snapshots.locks import FileLock

T = TypeVar("T")

logger = logging.getLogger(__name__)

_SUSPECT_CRASHES = 3
"""A chunk that was in progress at the end of this many processes is computed line by line."""
_MAX_CRASHES = 3
"""A line that was then in progress at the end of this many processes fails."""
_MAX_RETRY_S = 30.0
_MAX_WAIT_S = 120.0
_WAIT_FACTOR = 0.1
"""Lines that cannot be computed are tried again after this share of the time that they have waited."""
_RELEASE_S = 5.0
_MAX_REASON = 500
_MAX_WORKERS = 1000


class _LeaseLostError(Exception):
    """The work is no longer this worker's: it was taken over, or the batch was cancelled or expired."""


@dataclass(frozen=True, slots=True)
class _Signals:
    """What ends the work on a lease early."""

    lost: threading.Event = field(default_factory=threading.Event)
    """The lease is lost."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """The batch of the chunk was cancelled or has expired."""


class BatchWorker:
    """Works on the batches of a database, together with the workers of other processes."""

    def __init__(
        self,
        batches: BatchStore,
        directory: Path,
        calculator: Calculator,
        *,
        limits: Limits | None = None,
        options: WorkerOptions | None = None,
    ) -> None:
        """Create a worker.

        Args:
            batches: The batches.
            directory: The directory of the batches, which all processes share.
            calculator: Answers the lines.
            limits: What a batch may contain.
            options: How the worker divides its work and waits.
        """
        self._batches = batches
        self._files = batches.files
        self._directory = directory
        self._segments = SegmentStore(directory)
        self._calculator = calculator
        self._limits = limits or Limits()
        self._options = options or WorkerOptions()
        self._tasks: dict[asyncio.Task[None], Lease] = {}
        self._signals: dict[Lease, _Signals] = {}
        self._suspect = asyncio.Lock()
        self._pauses: dict[str, str] = {}
        """Why batches make no progress, as far as this worker knows."""
        self._waiting: dict[str, dict[int, float]] = {}
        """Since when chunks have lines that cannot be computed: by batch and chunk, times on the clock of the event loop."""
        self._threads: set[asyncio.Task[Any]] = set()
        self._claiming: asyncio.Task[Lease | None] | None = None
        self._heartbeat_at = 0.0
        """When leases are renewed next, on the clock of the event loop."""
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work: WorkStore

    @property
    def pauses(self) -> dict[str, str]:
        """Why batches make no progress, by their ids, even if the database cannot be written."""
        return dict(self._pauses)

    def wake(self) -> None:
        """Look for work now, for example because a batch was created or cancelled. Can be called from any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._wake.set)

    async def run(self) -> None:
        """Work until the task is cancelled. Leases are then returned, so that other workers continue at once."""
        self._loop = asyncio.get_running_loop()
        name, lock = await run_in_daemon_thread("batch-worker-name", lambda: _take_name(self._directory))
        self._work = WorkStore(self._batches, name, secrets.token_hex(8), self._options.lease_s)
        sweeping = asyncio.create_task(self._sweep_regularly())
        try:
            while True:
                if self._wake.is_set():
                    self._wake.clear()
                    self._heartbeat_at = 0.0
                await self._wait(await self._step())
        finally:
            for task in (sweeping, *self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, sweeping, return_exceptions=True)
            # Otherwise the name stays locked while the process lives, because a claim may still be in progress.
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._release_all(), _RELEASE_S)
                lock.release()

    # --- scheduling -----------------------------------------------------------------------------------

    async def _step(self) -> float:
        """Renew leases, and begin work if there is any. Returns how long to wait, in seconds."""
        options = self._options
        heartbeat_s = min(options.heartbeat_s, options.lease_s / 3)
        try:
            if self._time() >= self._heartbeat_at:
                self._heartbeat_at = self._time() + heartbeat_s
                await self._in_thread(self._work.expire)
                if self._tasks:
                    for lease in await self._in_thread(lambda: self._work.renew(list(self._tasks.values()))):
                        await self._abandon(lease)
            while len(self._tasks) < options.parallel:
                self._claiming = asyncio.create_task(self._in_thread(self._work.claim))
                claimed = await asyncio.shield(self._claiming)
                self._claiming = None
                if claimed is None:
                    break
                self._begin(claimed)
        except Exception as error:  # noqa: BLE001 - the worker goes on when the database responds again
            self._log_pause("", describe_error(error))
            return options.pause_s
        self._pauses.pop("", None)
        return heartbeat_s if self._tasks else options.poll_s

    async def _wait(self, seconds: float) -> None:
        """Wait for the end of a task, for `wake`, or for a time."""
        waking = asyncio.create_task(self._wake.wait())
        try:
            await asyncio.wait({waking, *self._tasks}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waking.cancel()
        for task in [task for task in self._tasks if task.done()]:
            lease = self._tasks.pop(task)
            self._signals.pop(lease, None)

    def _begin(self, lease: Lease) -> None:
        self._signals[lease] = _Signals()
        self._tasks[asyncio.create_task(self._run(lease))] = lease

    async def _abandon(self, lease: Lease) -> None:
        """Stop work on a lost lease."""
        if isinstance(lease, ChunkLease) and await self._in_thread(lambda: self._work.has_ended(lease)):
            self._signals[lease].ended.set()
            return
        self._signals[lease].lost.set()
        self._pauses.pop(lease.batch_id, None)
        for task in [task for task, each in self._tasks.items() if each is lease]:
            task.cancel()

    async def _run(self, lease: Lease) -> None:
        """Do what a lease is for."""
        try:
            if isinstance(lease, ChunkLease):
                await self._compute(lease)
            elif lease.batch.state == "validating":
                await self._validate(lease)
            else:
                await self._finalize(lease)
        except _LeaseLostError:
            logger.debug("the lease of %s is lost", lease.batch_id)
        except asyncio.CancelledError:
            self._signals[lease].lost.set()
            raise
        except RetryLaterError as error:
            await self._give_back(lease, describe_error(error), min(error.retry_after_s, _MAX_RETRY_S))
        except OSError as error:
            await self._give_back(lease, f"A file cannot be read: {error}", self._options.pause_s)
        except Exception as error:
            logger.exception("the batch %s cannot be continued", lease.batch_id)
            reason = f"The server failed to continue the batch ({type(error).__name__}). See its log."
            await self._give_back(lease, reason, self._options.pause_s)

    async def _give_back(self, lease: Lease, reason: str, wait_s: float) -> None:
        await self._pause(lease.batch_id, reason)
        await self._durably(lease, lambda: self._work.release(lease, wait_s))

    async def _release_all(self) -> None:
        await asyncio.gather(*self._threads, return_exceptions=True)
        leases = set(self._tasks.values())
        with contextlib.suppress(Exception):
            if self._claiming is not None and (claimed := await self._claiming) is not None:
                leases.add(claimed)
        for lease in leases:
            await self._in_thread(partial(self._work.release, lease))

    # --- validating -----------------------------------------------------------------------------------

    async def _validate(self, lease: BatchLease) -> None:
        path = self._files.path(lease.batch.input_file_id)
        lost = self._signals[lease].lost

        def raise_if_stopped() -> None:
            if lost.is_set():
                raise _LeaseLostError

        result = await self._in_thread(
            lambda: validate_file(
                path,
                lease.batch,
                lease.input_sha256,
                self._calculator.check,
                self._limits,
                self._options,
                raise_if_stopped,
            )
        )
        if await self._durably(lease, lambda: self._work.validated(lease, result)):
            self._continued(lease.batch_id)
            if result.errors:
                logger.info("batch %s failed: %d invalid lines", lease.batch_id, len(result.errors))
            else:
                logger.info("batch %s has %d lines in %d chunks", lease.batch_id, result.lines, len(result.chunks))

    # --- computing ------------------------------------------------------------------------------------

    async def _compute(self, lease: ChunkLease) -> None:
        batch = lease.batch
        path = self._files.path(batch.input_file_id)
        lines, kept = await self._in_thread(
            lambda: (read_chunk(path, lease.chunk, batch.endpoint), self._read_kept(batch.id, lease.kept))
        )
        computation = Computation(
            self._calculator, batch.endpoint, lease.input_sha256, lambda reason: self._pause(batch.id, reason)
        )
        missing = [line for line in lines if line_id("batch_req", lease.input_sha256, line.number) not in kept]
        has_ended = await self._compute_until_the_end(lease, computation, missing)
        answers, waiting = computation.answers, computation.waiting
        wait_s = 0.0
        if waiting and not has_ended:
            await self._pause(batch.id, next(iter(waiting.values())).message)
            since = self._waiting.setdefault(batch.id, {}).setdefault(lease.seq, self._time())
            if (waited_s := self._time() - since) >= self._options.max_wait_s:
                logger.error("%d lines of batch %s fail, because they waited too long", len(waiting), batch.id)
                answers |= {number: Answer(*error_body(error)) for number, error in waiting.items()}
            else:
                wait_s = min(_MAX_RETRY_S, max(error.retry_after_s for error in waiting.values()))
                wait_s = min(_MAX_WAIT_S, max(wait_s, _WAIT_FACTOR * waited_s))
        if not answers and missing:
            await self._durably(lease, lambda: self._work.release(lease, wait_s))
            return
        segment = await self._durably(lease, lambda: self._write(lease, lines, answers, kept))
        failed = sum(answer.status_code >= 400 for answer in answers.values())
        results = Results(segment, len(answers) - failed, failed, sum(answer.tokens for answer in answers.values()))
        if kept and lease.kept is not None:
            results = results.plus(lease.kept)
        is_complete = len(answers) == len(missing)
        if is_complete and await self._durably(lease, lambda: self._work.done(lease, results)):
            self._note_no_wait(lease)
            self._continued(batch.id)
        # A batch that was cancelled or has expired has no chunks that are done from then on.
        elif not await self._durably(lease, lambda: self._work.keep(lease, results, wait_s)):
            await self._in_thread(lambda: self._segments.remove(batch.id, segment.name))
            return
        if lease.fence > 1:
            await self._in_thread(lambda: self._segments.remove_older(batch.id, lease.seq, lease.fence))

    def _note_no_wait(self, lease: ChunkLease) -> None:
        waiting = self._waiting.get(lease.batch_id, {})
        waiting.pop(lease.seq, None)
        if not waiting:
            self._waiting.pop(lease.batch_id, None)

    def _read_kept(self, batch_id: str, results: Results | None) -> dict[str, tuple[bytes, bool]]:
        """Return the lines that were computed before, as `SegmentStore.read_lines`; none if they are damaged."""
        if results is None:
            return {}
        try:
            return self._segments.read_lines(batch_id, results.segment)
        except ValueError as error:
            logger.warning("lines of batch %s are lost: %s", batch_id, error)
            return {}

    async def _compute_until_the_end(
        self, lease: ChunkLease, computation: Computation, lines: Sequence[InputLine]
    ) -> bool:
        """Compute lines. Stop soon after the batch was cancelled or has expired. Returns whether it was."""
        if lease.crashes < _SUSPECT_CRASHES:
            computing = asyncio.create_task(computation.run(lines, self._stall_s(lease)))
        else:
            computing = asyncio.create_task(self._compute_one_by_one(lease, computation, lines))
        ended = asyncio.create_task(self._signals[lease].ended.wait())
        try:
            await asyncio.wait({computing, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                await asyncio.wait({computing}, timeout=self._options.grace_s)
        finally:
            ended.cancel()
            computing.cancel()
            await asyncio.wait({computing})
        if not computing.cancelled():
            computing.result()
        return self._signals[lease].ended.is_set()

    def _stall_s(self, lease: ChunkLease) -> float:
        """Return how long lines are tried again before the other ones are recorded without them."""
        return 0.0 if lease.batch_id in self._waiting else self._options.stall_s

    async def _compute_one_by_one(
        self, lease: ChunkLease, computation: Computation, lines: Sequence[InputLine]
    ) -> None:
        """Compute lines one after the other, because one of them may be what ends the process."""
        async with self._suspect:  # one such chunk at a time, so that only the line that is the cause has crashes
            with self._segments.crash_log(lease.batch_id, lease.seq) as log:
                for line in lines:
                    if log.crashes_at(line.number) >= _MAX_CRASHES:
                        logger.error("line %d of batch %s ends the process, and fails", line.number, lease.batch_id)
                        computation.answers[line.number] = Answer(*crash_body())
                        continue
                    with log.computing(line.number):
                        await computation.run([line], 0.0 if computation.waiting else self._stall_s(lease))

    def _write(
        self,
        lease: ChunkLease,
        lines: Sequence[InputLine],
        answers: Mapping[int, Answer],
        kept: Mapping[str, tuple[bytes, bool]],
    ) -> Segment:
        """Write the lines that have an answer, or had one before."""
        turns = Turns()
        output: list[bytes] = []
        errors: list[bytes] = []
        for line in lines:
            answer = answers.get(line.number)
            if answer is not None:
                of_line, is_output = answered_line(lease.input_sha256, line, answer), answer.status_code < 400
            elif (found := kept.get(line_id("batch_req", lease.input_sha256, line.number))) is not None:
                of_line, is_output = found
            else:
                continue
            (output if is_output else errors).append(of_line)
            turns.give()
        self._require_space(sum(map(len, output)) + sum(map(len, errors)))
        return self._segments.write(lease.batch_id, lease.seq, lease.fence, output, errors)

    # --- finalizing -----------------------------------------------------------------------------------

    async def _finalize(self, lease: BatchLease) -> None:
        if not await self._durably(lease, lambda: self._write_files(lease)):
            return
        self._continued(lease.batch_id)
        await self._in_thread(lambda: self._segments.remove_all(lease.batch_id))
        batch = await self._in_thread(lambda: self._batches.get(None, lease.batch_id))
        logger.info(
            "batch %s is %s: %d lines completed, %d failed", batch.id, batch.state, batch.completed, batch.failed
        )

    def _write_files(self, lease: BatchLease) -> bool:
        """Write the files of a batch from its segments, and end it. Returns whether it has ended."""
        batch = lease.batch
        expiry_s = lease.output_expires_after_s or DEFAULT_EXPIRY_S
        results = self._work.results(lease)
        self._require_space(self._segments.size(batch.id))
        ending = Ending(None, None)
        with (
            self._files.output(batch.owner, f"{batch.id}_output.jsonl", expiry_s) as output,
            self._files.output(batch.owner, f"{batch.id}_error.jsonl", expiry_s) as errors,
        ):
            for result in results:
                if self._signals[lease].lost.is_set():
                    raise _LeaseLostError
                if not result.is_done or result.results is None:
                    ending = self._write_unfinished(lease, result, output, errors, ending)
                    continue
                try:
                    for block, is_output in self._segments.read(batch.id, result.results.segment):
                        (output if is_output else errors).write(block)
                except ValueError as error:
                    logger.warning("chunk %d of batch %s is computed again: %s", result.seq, batch.id, error)
                    self._work.discard(lease, result.seq)
                    return False
            created_at = self._work.now()
            stored = [upload.store(created_at) if upload.size else None for upload in (output, errors)]
        try:
            ending = replace(ending, output=stored[0], errors=stored[1])
            is_ended = self._work.finalized(lease, self._files.record, ending)
        except DatabaseUnavailableError:
            # Whether the transaction was committed is unknown. If not, the files are removed later.
            raise
        except BaseException:
            self._remove(stored)
            raise
        if not is_ended:
            self._remove(stored)
        return is_ended

    def _write_unfinished(
        self, lease: BatchLease, result: ChunkResult, output: Upload, errors: Upload, ending: Ending
    ) -> Ending:
        """Write the lines of a chunk of a batch that was cancelled or has expired. Returns `ending` with their counts."""
        batch, counted = lease.batch, result.results
        kept = self._read_kept(batch.id, counted)
        try:
            lines = read_chunk(self._files.path(batch.input_file_id), result.chunk, batch.endpoint)
        except FileNotFoundError as error:
            logger.warning("the files of batch %s are incomplete: %s", batch.id, error)
            return replace(ending, failed=ending.failed + result.chunk.lines)
        turns = Turns()
        code = "batch_cancelled" if batch.state == "cancelling" else "batch_expired"
        for line in lines:
            of_line, is_output = kept.get(line_id("batch_req", lease.input_sha256, line.number)) or (
                unanswered_line(lease.input_sha256, line, code),
                False,
            )
            (output if is_output else errors).write(of_line)
            turns.give()
        if not kept or counted is None:
            return replace(ending, failed=ending.failed + len(lines))
        return replace(
            ending,
            completed=ending.completed + counted.completed,
            failed=ending.failed + len(lines) - counted.completed,
            tokens=ending.tokens + counted.tokens,
        )

    def _remove(self, stored: list[StoredFile | None]) -> None:
        for file in stored:
            if file is not None:
                self._files.path(file.id).unlink(missing_ok=True)

    # --- disks and databases that cannot be written ---------------------------------------------------

    async def _durably(self, lease: Lease, action: Callable[[], T]) -> T:
        """Run an action that writes, again and again while the disk is full or the database does not respond."""
        while True:
            try:
                return await self._in_thread(action)
            except (DatabaseUnavailableError, StorageFullError) as error:
                reason = error.message
            except OSError as error:
                reason = f"Results cannot be written: {error}."
            await self._pause(lease.batch_id, reason)
            await asyncio.sleep(self._options.pause_s)

    def _require_space(self, size: int) -> None:
        free = self._files.free_bytes()
        if free - size < self._options.min_free_bytes:
            raise StorageFullError(
                f"The disk of the batches is full ({format_size(free)} left). Free some space: the batch then continues."
            )

    async def _pause(self, batch_id: str, reason: str) -> None:
        """Show why a batch makes no progress, in the log and to its owner."""
        reason = printable(reason)[:_MAX_REASON]
        self._log_pause(batch_id, reason)
        # The database may be on the same full disk, or be the reason.
        with contextlib.suppress(DatabaseUnavailableError, StorageFullError):
            await self._in_thread(lambda: self._work.pause(batch_id, reason))

    def _log_pause(self, batch_id: str, reason: str) -> None:
        if self._pauses.get(batch_id) != reason:
            self._pauses[batch_id] = reason
            logger.warning("%s pauses: %s", f"batch {batch_id}" if batch_id else "the batch worker", reason)

    def _continued(self, batch_id: str) -> None:
        if self._pauses.pop(batch_id, None) is not None:
            logger.info("batch %s continues", batch_id)

    # --- other ----------------------------------------------------------------------------------------

    async def _sweep_regularly(self) -> None:
        while True:
            try:
                unfinished = await self._in_thread(self._sweep)
                for batch_id in self._waiting.keys() - unfinished:
                    del self._waiting[batch_id]
            except Exception as error:  # noqa: BLE001 - the next one may succeed
                logger.warning("expired files of batches could not be removed: %s", describe_error(error))
            await asyncio.sleep(self._options.sweep_s)

    def _sweep(self) -> set[str]:
        """Remove what is no longer needed. Returns the batches that have not ended."""
        self._files.remove_expired()
        if self._options.retention_s is not None and (count := self._batches.remove_ended(self._options.retention_s)):
            logger.info("%d batches were deleted, which had ended long ago", count)
        return self._segments.remove_ended(self._work.unfinished)

    async def _in_thread(self, action: Callable[[], T]) -> T:
        """Run an action on a thread. Its end is awaited by `run` if the caller is cancelled."""
        task = asyncio.create_task(run_in_daemon_thread("batch-worker", action))
        self._threads.add(task)
        task.add_done_callback(self._on_thread_end)
        return await asyncio.shield(task)

    def _on_thread_end(self, task: asyncio.Task[Any]) -> None:
        self._threads.discard(task)
        if not task.cancelled():
            task.exception()  # asyncio logs one that no caller has read

    def _time(self) -> float:
        return asyncio.get_running_loop().time()


def _take_name(directory: Path) -> tuple[str, FileLock]:
    """Return a name that no other living worker has, and its lock.

    A process that is started again takes the name of the one that ended, and so knows that its leases are free.
    """
    host = re.sub(r"[^A-Za-z0-9.-]+", "-", socket.gethostname())[:64]
    for number in range(_MAX_WORKERS):
        name = f"{host}-{number}"
        if (lock := try_lock_exclusive(directory / "workers" / f"{name}.lock")) is not None:
            return name, lock
    raise AssertionError("too many workers")
