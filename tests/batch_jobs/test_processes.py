"""Several processes work on one batch, and one that is killed or stopped for a while changes nothing in its files."""

from __future__ import annotations

import signal
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from benchmarks.batch_kills import Workers, input_file, process_batch
from tests.batch_jobs.helpers import ids, line, lines, reach, read_lines
from tests.service import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.batch_jobs.helpers import Jobs

pytestmark = pytest.mark.slow

CHUNK = 32


@pytest.fixture
def workers(jobs: Jobs, url: str | None) -> Iterator[Workers]:
    started = Workers(jobs.directory, url, chunk_inputs=CHUNK, poll_s=0.1, heartbeat_s=0.5)
    yield started
    started.kill_all()


def test_killed_workers(url: str | None, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Each line is in the files exactly once, in the same files as without kills, and little is computed twice."""
    count, kills = 2000, 20
    content = input_file(count)
    other = request.getfixturevalue("postgresql").create_schema() if url is not None else None
    undisturbed = process_batch(tmp_path / "0", other, content, 0, 0, line_s=0.0, chunk_inputs=CHUNK)
    killed = process_batch(tmp_path / "1", url, content, kills, 19, line_s=0.001, chunk_inputs=CHUNK)
    assert undisturbed.computed == count
    assert killed.custom_ids == Counter(f"id-{number}" for number in range(count))
    assert killed.output == undisturbed.output
    assert killed.errors == undisturbed.errors
    batches = [run.batch for run in (undisturbed, killed)]
    assert [(batch.state, batch.total, batch.failed) for batch in batches] == [("completed", count, 21)] * 2
    assert batches[0].tokens == batches[1].tokens
    assert 0 < killed.computed - count <= kills * 2 * CHUNK


async def test_several_processes(jobs: Jobs, workers: Workers) -> None:
    """All of them compute, and none computes what another one does."""
    batch = jobs.create(lines(1000))
    pids = [workers.start().pid for _ in range(3)]
    batch = await reach(jobs, batch, "completed")
    assert workers.computed() == Counter(f"text of line-{number}" for number in range(1000))
    assert set(workers.by_process()) <= set(pids)
    assert len(workers.by_process()) > 1
    assert ids(jobs, batch.output_file_id) == [f"line-{number}" for number in range(1000)]


async def test_a_process_that_was_stopped_for_longer_than_its_lease(jobs: Jobs, workers: Workers) -> None:
    """When it goes on, its chunks belong to another one, and it computes further chunks."""
    batch = jobs.create(lines(500))
    stopped = workers.start(lease_s=1.0)
    wait_until(lambda: jobs.batches.get("", batch.id).completed)
    stopped.send_signal(signal.SIGSTOP)
    other = workers.start()
    batch = await reach(jobs, batch, "completed")
    contents = jobs.files.content("", batch.output_file_id or "").read_bytes()
    workers.kill(other)
    stopped.send_signal(signal.SIGCONT)
    second = jobs.create(lines(64))
    await reach(jobs, second, "completed")
    assert jobs.batches.get("", batch.id) == batch
    assert jobs.files.content("", batch.output_file_id or "").read_bytes() == contents
    assert ids(jobs, batch.output_file_id) == [f"line-{number}" for number in range(500)]


async def test_an_interrupted_process_returns_its_work(jobs: Jobs, workers: Workers) -> None:
    """Another one goes on at once, although the leases were long."""
    batch = jobs.create(lines(500))
    first = workers.start(lease_s=3600)
    wait_until(lambda: jobs.batches.get("", batch.id).completed)
    workers.start(lease_s=3600)
    first.send_signal(signal.SIGINT)
    first.wait(60)
    batch = await reach(jobs, batch, "completed")
    assert ids(jobs, batch.output_file_id) == [f"line-{number}" for number in range(500)]


@pytest.mark.parametrize("url", [None], ids=["sqlite"])
async def test_a_line_that_ends_the_process(jobs: Jobs, workers: Workers) -> None:
    """It fails after a few crashes, and all other lines are computed, also those that were in progress with it."""
    batch = jobs.create(lines(40) + line("crash", body={"model": "m", "input": "crash"}) + lines(80)[len(lines(40)) :])
    for _ in range(6):
        assert workers.start().wait(60) == -signal.SIGKILL
    workers.start()
    batch = await reach(jobs, batch, "completed")
    assert ids(jobs, batch.output_file_id) == [f"line-{number}" for number in range(80)]
    (error,) = read_lines(jobs, batch.error_file_id)
    assert (error["custom_id"], error["response"]["status_code"]) == ("crash", 500)
    assert "ended each time" in error["response"]["body"]["error"]["message"]
