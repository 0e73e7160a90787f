"""Stores with a clock that tests set, input files, and workers."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks.batch_worker import HashCalculator
from emb_model_provider.batch_jobs.batches import Batch, BatchStore
from emb_model_provider.batch_jobs.files import FileStore, StoredFile
from emb_model_provider.batch_jobs.types import UNFINISHED, Limits, WorkerOptions
from emb_model_provider.batch_jobs.worker import BatchWorker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from sqlalchemy import Connection, Engine

    from emb_model_provider.batch_jobs.types import Calculator


class Jobs:
    """The stores of one database. `later_s` moves their clock."""

    def __init__(self, engine: Engine, directory: Path) -> None:
        self.engine = engine
        self.directory = directory
        self.later_s = 0.0
        self.files = FileStore(engine, directory, reserve_bytes=0, clock=self.now)
        self.batches = BatchStore(engine, self.files, clock=self.now)

    def now(self, _: Connection) -> float:
        return time.time() + self.later_s

    def upload(self, content: bytes, owner: str = "", **options: Any) -> StoredFile:
        with self.files.upload(owner, "input.jsonl", **options) as upload:
            upload.write(content)
            return upload.commit()

    def create(self, content: bytes, owner: str = "", **options: Any) -> Batch:
        file = self.upload(content, owner)
        return self.batches.create(owner, input_file_id=file.id, endpoint="/v1/embeddings", **options)


def line(custom_id: str, /, **changes: Any) -> bytes:
    """Return a line of an input file."""
    body = {"model": "m", "input": f"text of {custom_id}"}
    request = {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body}
    return json.dumps(request | changes).encode() + b"\n"


def lines(count: int) -> bytes:
    return b"".join(line(f"line-{number}") for number in range(count))


FAST = WorkerOptions(chunk_inputs=8, heartbeat_s=0.05, poll_s=0.05, pause_s=0.05, stall_s=0.2, grace_s=0.1)
"""Options of workers in tests, which wait for short times."""


@asynccontextmanager
async def working(jobs: Jobs, calculator: Calculator, *, count: int = 1, **changes: Any) -> AsyncIterator[BatchWorker]:
    """Run workers in the block, and yield the first one."""
    limits = Limits(
        **{name: changes.pop(name) for name in ("max_lines", "max_inputs", "max_line_bytes") if name in changes}
    )
    options = replace(FAST, **changes)
    workers = [
        BatchWorker(jobs.batches, jobs.directory, calculator, limits=limits, options=options) for _ in range(count)
    ]
    tasks = [asyncio.create_task(worker.run()) for worker in workers]
    try:
        yield workers[0]
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def reach(jobs: Jobs, batch: Batch, condition: str | Callable[[Batch], object]) -> Batch:
    """Wait until a batch is in a state, or a condition holds, and return it."""
    deadline = time.monotonic() + 20
    while True:
        current = await asyncio.to_thread(jobs.batches.get, None, batch.id)
        if current.state == condition if isinstance(condition, str) else condition(current):
            return current
        assert time.monotonic() < deadline, current
        await asyncio.sleep(0.02)


async def reach_no_segments(jobs: Jobs) -> None:
    """Wait until a worker has removed the segments of all batches, which it does after their ends."""
    deadline = time.monotonic() + 20
    while found := list((jobs.directory / "segments").iterdir()):
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)


async def process(jobs: Jobs, content: bytes, *, calculator: Calculator | None = None, **changes: Any) -> Batch:
    """Process an input file until its batch has ended."""
    batch = jobs.create(content)
    async with working(jobs, calculator or HashCalculator(), **changes):
        return await reach(jobs, batch, lambda current: current.state not in UNFINISHED)


def read_lines(jobs: Jobs, file_id: str | None) -> list[dict[str, Any]]:
    """Return the lines of an output or error file; none if the file does not exist."""
    if file_id is None:
        return []
    return [json.loads(each) for each in jobs.files.content(None, file_id).read_bytes().splitlines()]


def ids(jobs: Jobs, file_id: str | None) -> list[str]:
    return [each["custom_id"] for each in read_lines(jobs, file_id)]
