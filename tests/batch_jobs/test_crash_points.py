"""A worker that crashes at any of its durable steps changes nothing in the files of a batch.

The process is killed before or after each synchronization, rename and commit, one after the other. Unlike kills at random
moments, this hits every one of them.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.batch_worker import HashCalculator, open_batches
from emb_model_provider.batch_jobs.types import WorkerOptions
from emb_model_provider.batch_jobs.worker import BatchWorker
from emb_model_provider.errors import ModelNotReadyError
from tests.batch_jobs.helpers import Jobs, ids, line, lines, process, reach, read_lines, working

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from emb_model_provider.batch_jobs.batches import Batch
    from emb_model_provider.batch_jobs.types import Answer

pytestmark = pytest.mark.slow

CONTENT = lines(12) + line("long", body={"model": "m", "input": "too long"})
_OPTIONS = WorkerOptions(chunk_inputs=8, parallel=1, poll_s=0.05, stall_s=0.0, grace_s=0.0)


class Unready(HashCalculator):
    """Has no time for one line in its first attempt."""

    async def answer(self, endpoint: str, body: Mapping[str, Any], request_id: str) -> Answer:
        if body["input"] == "text of line-3" and not self.computed["attempt"]:
            self.computed["attempt"] += 1
            raise ModelNotReadyError("The model is loading.", retry_after_s=0.01)
        return await super().answer(endpoint, body, request_id)


class Blocking(HashCalculator):
    """Computes ten lines, and then nothing."""

    async def answer(self, endpoint: str, body: Mapping[str, Any], request_id: str) -> Answer:
        if self.is_blocked:
            await asyncio.Event().wait()
        return await super().answer(endpoint, body, request_id)

    @property
    def is_blocked(self) -> bool:
        return self.computed.total() == 10


def crash_at(step: int) -> None:
    """Kill this process at a step. Each operation has two steps, before it and after it."""
    steps = itertools.count()

    def count() -> None:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            count()
            result = operation(*arguments)
            count()
            return result

        return run

    os.fsync = counted(os.fsync)
    Path.rename = counted(Path.rename)  # type: ignore[method-assign]
    dialects = ("sqlalchemy.dialects.sqlite.pysqlite", "sqlalchemy.dialects.postgresql.psycopg")
    for name, dialect in zip(dialects, ("SQLiteDialect_pysqlite", "PGDialect_psycopg"), strict=True):
        cls = getattr(sys.modules.get(name), dialect, None)
        if cls is not None:
            cls.do_commit = counted(cls.do_commit)


def work_in_fork(
    directory: Path, url: str | None, step: int, calculator: HashCalculator, cancelled: str | None = None
) -> bool:
    """Run a worker in a fork of this process until the batch has ended or it crashes. Returns whether it crashed.

    The batch `cancelled` is cancelled when the calculator blocks.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            store = open_batches(directory, url)  # so that the dialect is imported
            crash_at(step)
            worker = BatchWorker(store, directory, calculator, options=_OPTIONS)

            async def run() -> None:
                task = asyncio.create_task(worker.run())
                if isinstance(calculator, Blocking) and cancelled is not None:
                    while not calculator.is_blocked:
                        await asyncio.sleep(0.01)
                    await asyncio.to_thread(store.cancel, None, cancelled)
                    worker.wake()
                while await asyncio.to_thread(store.has_unfinished):
                    await asyncio.sleep(0.01)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

            asyncio.run(run())
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


@pytest.mark.parametrize("calculator", [HashCalculator, Unready])
def test_each_step(jobs: Jobs, url: str | None, calculator: type[HashCalculator]) -> None:
    """Also of a batch with a line that is computed later than the others of its chunk."""
    undisturbed = asyncio.run(process(jobs, CONTENT, chunk_inputs=8))
    expected = contents(jobs, undisturbed)

    async def finish(batch: Batch) -> Batch:
        async with working(jobs, HashCalculator()):
            return await reach(jobs, batch, "completed")

    for step in itertools.count():
        batch = jobs.create(CONTENT)
        jobs.engine.dispose()  # connections do not survive a fork
        is_crash = work_in_fork(jobs.directory, url, step, calculator())
        batch = asyncio.run(finish(batch))
        assert contents(jobs, batch) == expected, f"after a crash at step {step}"
        assert (batch.completed, batch.failed, batch.tokens) == (12, 1, undisturbed.tokens)
        if not is_crash:
            break
    # Two segments and two files, each with its directory, and the commits of three leases and their results.
    least = 2 * (2 * 2 + 2 * 3 + 8)
    assert step > (least if calculator is HashCalculator else least + 2 * (2 + 2))


def test_each_step_of_a_cancel(jobs: Jobs, url: str | None) -> None:
    """Each line is in the files once, and counted."""

    async def finish(batch: Batch) -> Batch:
        async with working(jobs, HashCalculator()):
            return await reach(jobs, batch, "cancelled")

    kept = set()
    for step in itertools.count():
        batch = jobs.create(CONTENT)
        jobs.engine.dispose()
        is_crash = work_in_fork(jobs.directory, url, step, Blocking(), batch.id)
        if jobs.batches.get(None, batch.id).state not in ("cancelling", "cancelled"):
            jobs.batches.cancel(None, batch.id)
        batch = asyncio.run(finish(batch))
        output, errors = ids(jobs, batch.output_file_id), read_lines(jobs, batch.error_file_id)
        expected = [f"line-{number}" for number in range(len(output))]
        assert output == expected, f"after a crash at step {step}"
        assert all(each["error"]["code"] == "batch_cancelled" for each in errors)
        # Before the validation there are no lines.
        found = [*output, *(each["custom_id"] for each in errors)]
        assert found in ([], [*(f"line-{number}" for number in range(12)), "long"]), f"after a crash at step {step}"
        assert (batch.completed, batch.failed) == (len(output), len(errors))
        assert batch.tokens == sum(len(f'"text of {name}"') for name in output)
        kept.add(len(output))
        if not is_crash:
            break
    assert kept == {0, 8, 10}


def contents(jobs: Jobs, batch: Batch) -> list[bytes]:
    return [jobs.files.content("", each or "").read_bytes() for each in (batch.output_file_id, batch.error_file_id)]
