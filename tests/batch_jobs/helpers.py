"""Stores with a clock that tests set, and input files."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from emb_model_provider.batch_jobs.batches import Batch, BatchStore
from emb_model_provider.batch_jobs.files import FileStore, StoredFile

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Connection, Engine


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


def line(custom_id: str, **changes: Any) -> bytes:
    """Return a line of an input file."""
    body = {"model": "m", "input": f"text of {custom_id}"}
    request = {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body}
    return json.dumps(request | changes).encode() + b"\n"


def lines(count: int) -> bytes:
    return b"".join(line(f"line-{number}") for number in range(count))
