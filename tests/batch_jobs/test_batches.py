"""Clients create, read, list and cancel their batches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.batch_worker import HashCalculator
from emb_model_provider.errors import RequestError, TooManyBatchesError, UnknownBatchError, UnknownFileError
from tests.batch_jobs.helpers import line, lines, process, reach, working

if TYPE_CHECKING:
    from emb_model_provider.batch_jobs.batches import Batch
    from tests.batch_jobs.helpers import Jobs

DAY_S = 24 * 3600


def test_create(jobs: Jobs) -> None:
    assert not jobs.batches.has_unfinished()
    metadata = {"job": "nightly \0\ud800 向量"}
    batch = jobs.create(lines(3), "a", metadata=metadata, output_expires_after_s=3600)
    assert batch.id.startswith("batch_")
    assert (batch.state, batch.endpoint, batch.owner, batch.metadata) == ("validating", "/v1/embeddings", "a", metadata)
    assert batch.expires_at == batch.created_at + 24 * 3600
    assert (batch.total, batch.completed, batch.failed, batch.tokens, batch.errors) == (0, 0, 0, 0, ())
    assert jobs.batches.get("a", batch.id) == batch
    assert jobs.batches.has_unfinished()
    assert jobs.batches.figures().states == {"validating": 1}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"endpoint": "/v1/chat/completions"}, "endpoint", "Supported values: '/v1/embeddings', '/v1/rerank'"),
        ({"completion_window": "1h"}, "completion_window", "Supported values: '24h'"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "has 17 pairs, at most 16"),
        ({"metadata": {"k" * 65: ""}}, "metadata", "up to 64 characters"),
        ({"metadata": {"k": "v" * 513}}, "metadata", "512"),
        ({"metadata": {"k": 1}}, "metadata", "are strings"),
    ],
)
def test_invalid_fields(jobs: Jobs, fields: dict[str, Any], param: str, message: str) -> None:
    file = jobs.upload(lines(1))
    with pytest.raises(RequestError, match=message) as caught:
        jobs.batches.create("", **{"input_file_id": file.id, "endpoint": "/v1/embeddings"} | fields)
    assert caught.value.param == param


def test_invalid_input_files(jobs: Jobs) -> None:
    own, other = jobs.upload(lines(1), "a", purpose="batch_output"), jobs.upload(lines(1), "b")
    for file_id, error in ((own.id, RequestError), (other.id, UnknownFileError), ("nothing", UnknownFileError)):
        with pytest.raises(error) as caught:
            jobs.batches.create("a", input_file_id=file_id, endpoint="/v1/embeddings")
        assert caught.value.param == "input_file_id"


def test_batches_of_others_do_not_exist(jobs: Jobs) -> None:
    batch = jobs.create(lines(1), "a")
    for operation in (jobs.batches.get, jobs.batches.cancel):
        with pytest.raises(UnknownBatchError, match=f"No batch found with id '{batch.id}'"):
            operation("b", batch.id)
    assert jobs.batches.list("b").items == ()
    assert jobs.batches.get(None, batch.id) == batch


def test_list(jobs: Jobs) -> None:
    made = [jobs.create(lines(1), "a").id for _ in range(5)]
    jobs.create(lines(1), "b")
    pages = [jobs.batches.list("a", limit=2)]
    while pages[-1].has_more:
        pages.append(jobs.batches.list("a", limit=2, after=pages[-1].items[-1].id))
    assert [batch.id for page in pages for batch in page.items] == made[::-1]
    assert len(jobs.batches.list(None).items) == 6
    with pytest.raises(UnknownBatchError):
        jobs.batches.list("b", after=made[0])


def test_cancel(jobs: Jobs) -> None:
    batch = jobs.create(lines(1))
    cancelled = jobs.batches.cancel("", batch.id)
    assert cancelled.state == "cancelling"
    assert cancelled.cancelling_at is not None
    assert jobs.batches.cancel("", batch.id) == cancelled


def test_too_many_unfinished_batches(jobs: Jobs) -> None:
    """The limit is for each owner, and also holds if they are created at the same time. Ended batches do not count."""
    jobs.batches.max_unfinished = 3
    file = jobs.upload(lines(1), "a")

    def create(_: int) -> Batch | None:
        with suppress(TooManyBatchesError):
            return jobs.batches.create("a", input_file_id=file.id, endpoint="/v1/embeddings")
        return None

    with ThreadPoolExecutor(8) as threads:
        created = [batch for batch in threads.map(create, range(16)) if batch is not None]
    assert len(created) == 3
    jobs.create(lines(1), "b")
    jobs.batches.cancel("a", created[0].id)
    assert create(0) is None


async def test_ended_batches_do_not_count(jobs: Jobs) -> None:
    jobs.batches.max_unfinished = 1
    for _ in range(2):
        await process(jobs, lines(1))
    jobs.batches.max_unfinished = 0
    assert jobs.create(lines(1))
    assert jobs.create(lines(1))


async def test_batches_that_ended_long_ago(jobs: Jobs) -> None:
    """They are deleted with their files, except an input that another batch reads. Without a time, all are kept."""
    old = await process(jobs, lines(8) + line("long", body={"input": "too long"}))
    failed = await process(jobs, b"{\n")
    shared = await process(jobs, lines(3))
    jobs.later_s = 2 * DAY_S
    new = jobs.batches.create("", input_file_id=shared.input_file_id, endpoint="/v1/embeddings")
    async with working(jobs, HashCalculator(), sweep_s=0.05):
        new = await reach(jobs, new, "completed")
    assert len(jobs.batches.list(None).items) == 4
    async with working(jobs, HashCalculator(), sweep_s=0.05, retention_s=DAY_S) as worker:
        worker.wake()
        await reach(jobs, new, lambda _: len(jobs.batches.list(None).items) == 1)
        kept = {new.output_file_id, shared.input_file_id}
        await reach(jobs, new, lambda _: {path.name for path in jobs.files.directory.iterdir()} == kept)
    assert {file.id for file in jobs.files.list(None).items} == kept
    for batch in (old, failed, shared):
        with pytest.raises(UnknownBatchError):
            jobs.batches.get("", batch.id)


def test_unfinished_batches_are_never_deleted(jobs: Jobs) -> None:
    batch = jobs.create(lines(8))
    jobs.later_s = 1000 * DAY_S
    assert jobs.batches.remove_ended(DAY_S) == 0
    assert jobs.batches.get("", batch.id) == batch
