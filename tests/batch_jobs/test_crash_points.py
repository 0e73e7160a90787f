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
from tests.batch_jobs.helpers import Jobs, line, lines, process, reach, working

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.batch_jobs.batches import Batch

pytestmark = pytest.mark.slow

CONTENT = lines(12) + line("long", body={"model": "m", "input": "too long"})
_OPTIONS = WorkerOptions(chunk_inputs=8, parallel=1, poll_s=0.05)


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


def work_in_fork(directory: Path, url: str | None, step: int) -> bool:
    """Run a worker in a fork of this process until the batch has ended or it crashes. Returns whether it crashed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            store = open_batches(directory, url)  # so that the dialect is imported
            crash_at(step)
            worker = BatchWorker(store, directory, HashCalculator(), options=_OPTIONS)

            async def run() -> None:
                task = asyncio.create_task(worker.run())
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


def test_each_step(jobs: Jobs, url: str | None) -> None:
    undisturbed = asyncio.run(process(jobs, CONTENT, chunk_inputs=8))
    expected = contents(jobs, undisturbed)

    async def finish(batch: Batch) -> Batch:
        async with working(jobs, HashCalculator()):
            return await reach(jobs, batch, "completed")

    for step in itertools.count():
        batch = jobs.create(CONTENT)
        jobs.engine.dispose()  # connections do not survive a fork
        is_crash = work_in_fork(jobs.directory, url, step)
        batch = asyncio.run(finish(batch))
        assert contents(jobs, batch) == expected, f"after a crash at step {step}"
        assert (batch.completed, batch.failed, batch.tokens) == (12, 1, undisturbed.tokens)
        if not is_crash:
            break
    # Two segments and two files, each with its directory, and the commits of three leases and their results.
    assert step > 2 * (2 * 2 + 2 * 3 + 8)


def contents(jobs: Jobs, batch: Batch) -> list[bytes]:
    return [jobs.files.content("", each or "").read_bytes() for each in (batch.output_file_id, batch.error_file_id)]
