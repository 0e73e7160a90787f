"""A full disk and a database that does not respond interrupt batches, and nothing is lost."""

from __future__ import annotations

import asyncio
import logging
import resource
import shutil
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from benchmarks.batch_worker import HashCalculator
from emb_model_provider.batch_jobs.database import open_database
from emb_model_provider.errors import DatabaseUnavailableError, StorageFullError
from tests.batch_jobs.helpers import Jobs, ids, lines, reach, working
from tests.service import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.postgresql import PostgreSQL
    from emb_model_provider.batch_jobs.worker import BatchWorker

LINES = [f"line-{number}" for number in range(400)]


@contextmanager
def no_larger_files(size: int) -> Iterator[None]:
    """Let writes of this process fail from `size` bytes on, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


async def pause_of(worker: BatchWorker, *phrases: str) -> None:
    """Wait until a worker pauses with one of these reasons."""
    deadline = time.monotonic() + 30
    while not any(phrase in reason for reason in worker.pauses.values() for phrase in phrases):
        assert time.monotonic() < deadline, worker.pauses
        await asyncio.sleep(0.01)


def test_a_disk_that_becomes_full_during_an_upload(jobs: Jobs) -> None:
    with jobs.files.upload("", "a") as upload, no_larger_files(100_000):
        upload.write(b"x" * 60_000)
        with pytest.raises(StorageFullError, match="Delete files"):
            upload.write(b"x" * 60_000)
    assert not list(jobs.files.directory.iterdir())


async def test_too_little_space_for_results(jobs: Jobs, caplog: pytest.LogCaptureFixture) -> None:
    """The batch says why it waits, and goes on when there is space. What was computed is not computed again."""
    caplog.set_level(logging.INFO, "emb_model_provider.batch_jobs")
    batch = jobs.create(lines(64))
    calculator = HashCalculator(line_s=0.001)
    async with working(jobs, calculator, parallel=1) as worker:
        await reach(jobs, batch, lambda current: current.completed)
        jobs.files.free_bytes = lambda: 50_000_000  # type: ignore[method-assign]
        paused = await reach(jobs, batch, lambda current: current.pause_reason)
        assert (
            paused.pause_reason
            == "The disk of the batches is full (50.0 MB left). Free some space: the batch then continues."
        )
        assert (paused.state, worker.pauses) == ("in_progress", {batch.id: paused.pause_reason})
        del jobs.files.free_bytes
        batch = await reach(jobs, batch, "completed")
    assert batch.pause_reason is None
    assert calculator.computed.total() == 64
    assert [record.message for record in caplog.records if batch.id in record.message][1:3] == [
        f"batch {batch.id} pauses: {paused.pause_reason}",
        f"batch {batch.id} continues",
    ]


async def test_a_disk_that_is_full_when_a_segment_is_written(jobs: Jobs) -> None:
    """The system says so only when the bytes are written."""
    batch = jobs.create(lines(64))
    directory = jobs.directory / "segments" / batch.id
    directory.mkdir(parents=True)
    (directory / "000001.1.jsonl").symlink_to("/dev/full")
    calculator = HashCalculator()
    async with working(jobs, calculator, pause_s=0.5, parallel=1) as worker:
        await pause_of(worker, "No space left on device")
        batch = await reach(jobs, batch, "completed")
    assert calculator.computed.total() == 64
    assert ids(jobs, batch.output_file_id) == LINES[:64]


async def test_a_disk_that_is_full_when_the_files_are_written(jobs: Jobs) -> None:
    """And, with SQLite, also the database."""
    batch = jobs.create(lines(400))
    async with working(jobs, HashCalculator()) as worker:
        with no_larger_files(60_000):
            await pause_of(worker, "The disk of the files is full", "disk I/O error", "is full")
            assert jobs.batches.get("", batch.id).state in ("validating", "in_progress", "finalizing")
        batch = await reach(jobs, batch, "completed")
    assert ids(jobs, batch.output_file_id) == LINES
    assert len(list(jobs.files.directory.iterdir())) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 3 MB."""
    path = tmp_path / "mount"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with path.open("wb", buffering=0) as stream:
        while shutil.disk_usage(path).free:
            stream.write(b"x" * 4096)


@pytest.mark.slow
async def test_a_file_system_that_is_full(small_disk: Path) -> None:
    """That of SQLite, the segments and the files."""
    jobs = Jobs(open_database(None, small_disk), small_disk)
    batch = jobs.create(lines(400))
    async with working(jobs, HashCalculator(line_s=0.001), min_free_bytes=0) as worker:
        await reach(jobs, batch, lambda current: current.completed)
        fill(small_disk / "filler")
        await pause_of(worker, "No space left on device", "is full", "disk I/O error")
        (small_disk / "filler").unlink()
        batch = await reach(jobs, batch, "completed")
    assert ids(jobs, batch.output_file_id) == LINES
    jobs.engine.dispose()


@pytest.mark.slow
async def test_a_database_server_that_is_started_again(postgresql: PostgreSQL, tmp_path: Path) -> None:
    """The batch goes on, and requests are refused meanwhile."""
    engine = open_database(postgresql.create_schema(), tmp_path)
    jobs = Jobs(engine, tmp_path)
    batch = jobs.create(lines(400))
    calculator = HashCalculator(line_s=0.001)
    async with working(jobs, calculator) as worker:
        await reach(jobs, batch, lambda current: current.completed)
        await asyncio.to_thread(postgresql.stop)
        await pause_of(worker, "does not respond")
        with pytest.raises(DatabaseUnavailableError, match="does not respond"):
            await asyncio.to_thread(jobs.batches.get, "", batch.id)
        await asyncio.to_thread(postgresql.start)
        batch = await reach(jobs, batch, "completed")
    assert ids(jobs, batch.output_file_id) == LINES
    assert batch.completed == 400
    engine.dispose()
    wait_until(lambda: not list((tmp_path / "segments").iterdir()))
