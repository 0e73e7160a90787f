"""Files are complete, belong to their owner, and expire."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from emb_model_provider.batch_jobs import tables
from emb_model_provider.batch_jobs.batches import BatchStore
from emb_model_provider.batch_jobs.database import transaction
from emb_model_provider.batch_jobs.files import FileStore
from emb_model_provider.errors import (
    FileTooLargeError,
    StateConflictError,
    StorageFullError,
    UnknownBatchError,
    UnknownFileError,
)
from tests.batch_jobs.helpers import lines

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import Connection, Engine

    from tests.batch_jobs.helpers import Jobs


def stored(jobs: Jobs) -> list[str]:
    return sorted(path.name for path in jobs.files.directory.iterdir())


def test_upload(jobs: Jobs) -> None:
    with jobs.files.upload("a", "texts.jsonl", expires_after_s=3600) as upload:
        upload.write(b"first ")
        upload.write(memoryview(b"second"))
        file = upload.commit()
    assert (file.bytes, file.sha256) == (12, hashlib.sha256(b"first second").hexdigest())
    assert (file.filename, file.owner, file.purpose) == ("texts.jsonl", "a", "batch")
    assert file.expires_at == file.created_at + 3600
    assert jobs.files.get("a", file.id) == file
    assert jobs.files.content("a", file.id).read_bytes() == b"first second"
    assert jobs.files.total_bytes() == 12


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\a\\b.jsonl", "b.jsonl"),
        ("a\0b\ud800\n", "a?b??"),
        ("", "file.jsonl"),
        ("向量.jsonl", "向量.jsonl"),
    ],
    ids=["directories", "windows", "not-text", "empty", "chinese"],
)
def test_names_of_files(jobs: Jobs, name: str, stored: str) -> None:
    with jobs.files.upload("", name) as upload:
        assert upload.commit().filename == stored


def test_an_interrupted_upload_leaves_nothing(jobs: Jobs) -> None:
    with jobs.files.upload("", "a") as upload:
        upload.write(b"x" * 1000)
    assert stored(jobs) == []
    assert jobs.files.list(None).items == ()


def test_files_of_others_do_not_exist(jobs: Jobs) -> None:
    file = jobs.upload(b"x", "a")
    for operation in (jobs.files.get, jobs.files.content, jobs.files.delete):
        with pytest.raises(UnknownFileError, match=f"No such File object: {file.id}"):
            operation("b", file.id)
    assert jobs.files.list("b").items == ()
    assert jobs.files.get(None, file.id) == jobs.files.get("a", file.id)


@pytest.mark.parametrize(
    "name", ["", "file-1", "a\0b", "\ud800", "../../etc/passwd"], ids=["empty", "other", "nul", "surrogate", "path"]
)
def test_ids_that_no_file_has(jobs: Jobs, name: str) -> None:
    jobs.upload(b"x")
    for operation in (jobs.files.get, jobs.files.content, jobs.files.delete):
        with pytest.raises(UnknownFileError):
            operation("", name)
    with pytest.raises(UnknownFileError):
        jobs.files.list("", after=name)
    with pytest.raises(UnknownBatchError):
        jobs.batches.get("", name)
    assert jobs.files.list("", purpose=name).items == ()


def test_list(jobs: Jobs) -> None:
    made = [jobs.upload(b"x", "a").id for _ in range(5)]
    jobs.upload(b"x", "b")
    pages = [jobs.files.list("a", limit=2)]
    while pages[-1].has_more:
        pages.append(jobs.files.list("a", limit=2, after=pages[-1].items[-1].id))
    assert [file.id for page in pages for file in page.items] == made[::-1]
    assert [file.id for file in jobs.files.list("a", order="asc", after=made[2]).items] == made[3:]
    assert jobs.files.list("a", purpose="batch_output").items == ()
    with pytest.raises(UnknownFileError, match="nothing") as caught:
        jobs.files.list("a", after="nothing")
    assert caught.value.param == "after"


def test_delete(jobs: Jobs) -> None:
    file = jobs.upload(b"x")
    jobs.files.delete("", file.id)
    assert stored(jobs) == []
    with pytest.raises(UnknownFileError):
        jobs.files.delete("", file.id)


def test_the_input_of_an_unfinished_batch_stays(jobs: Jobs) -> None:
    batch = jobs.create(lines(1))
    with pytest.raises(StateConflictError, match=batch.id):
        jobs.files.delete("", batch.input_file_id)
    jobs.later_s = 31 * 24 * 3600
    assert jobs.files.remove_expired() == 0
    assert jobs.files.path(batch.input_file_id).exists()


def remove_by_id(jobs: Jobs, file_id: str) -> None:
    with pytest.raises(StateConflictError):
        jobs.files.delete("a", file_id)


def remove_expired(jobs: Jobs, _: str) -> None:
    jobs.later_s = 7200
    jobs.files.remove_expired()


def remove_with_an_ended_batch(jobs: Jobs, _: str) -> None:
    assert jobs.batches.remove_ended(0.0) == 1


@pytest.mark.parametrize("remove", [remove_by_id, remove_expired, remove_with_an_ended_batch])
def test_a_file_that_is_deleted_while_a_batch_is_created(jobs: Jobs, remove: Callable[[Jobs, str], None]) -> None:
    """The file of the batch stays, although the batch is not yet visible when the deletion begins."""
    creating, go_on = threading.Event(), threading.Event()

    def wait(connection: Connection) -> float:
        creating.set()
        assert go_on.wait(30)
        return jobs.now(connection)

    file = jobs.upload(lines(3), "a", expires_after_s=3600)
    ended = jobs.batches.create("a", input_file_id=file.id, endpoint="/v1/embeddings")
    with transaction(jobs.engine) as connection:
        connection.execute(sa.update(tables.batches).values(state="failed", failed_at=ended.created_at))
    batches = BatchStore(jobs.engine, jobs.files, clock=wait)
    with ThreadPoolExecutor(2) as pool:
        created = pool.submit(batches.create, "a", input_file_id=file.id, endpoint="/v1/embeddings")
        assert creating.wait(30)
        removed = pool.submit(remove, jobs, file.id)
        wait_for([removed], timeout=0.3)
        go_on.set()
        assert created.result(30).input_file_id == file.id
        removed.result(30)
    jobs.later_s = 0.0
    assert jobs.files.content("a", file.id).exists()


def test_expired_files(jobs: Jobs) -> None:
    short, long = jobs.upload(b"x", expires_after_s=3600), jobs.upload(b"x", expires_after_s=7200)
    jobs.later_s = 3601
    with pytest.raises(UnknownFileError):
        jobs.files.get("", short.id)
    assert jobs.files.list("").items == (long,)
    assert jobs.files.remove_expired() == 1
    assert stored(jobs) == [long.id]


def test_content_without_a_row_is_removed_after_a_while(jobs: Jobs) -> None:
    file = jobs.upload(b"x")
    old, new = jobs.files.directory / ".file-1.tmp", jobs.files.directory / ".file-2.tmp"
    for path in (old, new):
        path.write_bytes(b"part of an upload")
    for path in (old, jobs.files.path(file.id)):
        os.utime(path, (time.time() - 7200,) * 2)
    jobs.files.remove_expired()
    assert stored(jobs) == [new.name, file.id]


def test_limit_of_size(jobs: Jobs) -> None:
    jobs.files.max_bytes = 10
    with pytest.raises(FileTooLargeError, match="more than 10 bytes"):
        jobs.files.upload("", "a", expected_bytes=11)
    with jobs.files.upload("", "a") as upload:
        upload.write(b"x" * 10)
        with pytest.raises(FileTooLargeError):
            upload.write(b"x")
    assert stored(jobs) == []


def test_reserve_of_space(engine: Engine, tmp_path: Path) -> None:
    files = FileStore(engine, tmp_path, reserve_bytes=10**18)
    with pytest.raises(StorageFullError, match="left, of which"):
        files.upload("", "a")
