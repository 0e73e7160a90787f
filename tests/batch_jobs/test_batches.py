"""Clients create, read, list and cancel their batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.errors import RequestError, UnknownBatchError, UnknownFileError
from tests.batch_jobs.helpers import lines

if TYPE_CHECKING:
    from tests.batch_jobs.helpers import Jobs


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
