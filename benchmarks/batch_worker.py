"""A worker of batches without a model, as a process: `python -m benchmarks.batch_worker '{"directory": …}'`.

Each text that it computes is appended to the file `computed` in the directory of the batches.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emb_model_provider.batch_jobs.batches import BatchStore
from emb_model_provider.batch_jobs.database import open_database
from emb_model_provider.batch_jobs.files import FileStore
from emb_model_provider.batch_jobs.types import Answer, WorkerOptions
from emb_model_provider.batch_jobs.worker import BatchWorker
from emb_model_provider.errors import InputTooLongError, RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RECORD = "computed"
"""Name of the file that lists process and text of each computation."""


class HashCalculator:
    """Answers with the hash of the text, and counts what it answers. A text `too long` is refused when it is computed."""

    def __init__(self, *, line_s: float = 0.0) -> None:
        """Create a calculator that needs `line_s` seconds for a line, one after the other, as a model does."""
        self.computed: Counter[str] = Counter()
        self._line_s = line_s
        self._model = asyncio.Lock()

    def check(self, endpoint: str, body: Mapping[str, Any]) -> int:  # noqa: ARG002 - the protocol
        if "input" not in body:
            raise RequestError("Missing required parameter: 'input'.", param="input", code="missing_required_parameter")
        return len(body["input"]) if isinstance(body["input"], list) else 1

    async def answer(self, endpoint: str, body: Mapping[str, Any], request_id: str) -> Answer:  # noqa: ARG002
        async with self._model:
            self.count(body)
            await asyncio.sleep(self._line_s)
        if body["input"] == "too long":
            raise InputTooLongError(0, 512)
        text = json.dumps(body["input"])
        vector = list(hashlib.sha256(text.encode()).digest())
        return Answer(200, json.dumps({"data": [{"embedding": vector}], "id": request_id}).encode(), len(text))

    def group(self, endpoint: str, bodies: Sequence[Mapping[str, Any]]) -> list[list[int]]:  # noqa: ARG002 - lines are alone, whatever they are
        return [[position] for position in range(len(bodies))]

    async def answer_group(self, endpoint: str, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
        return [await self.answer(endpoint, body, "") for body in bodies]

    def count(self, body: Mapping[str, Any]) -> None:
        self.computed[json.dumps(body["input"])] += 1


class RecordingCalculator(HashCalculator):
    """Appends each text that it computes to a file, from which a kill of the process removes nothing.

    The text `crash` ends the process.
    """

    def __init__(self, path: Path, line_s: float) -> None:
        super().__init__(line_s=line_s)
        self._record = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def count(self, body: Mapping[str, Any]) -> None:
        if body["input"] == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(self._record, f"{os.getpid()} {body['input']}\n".encode())


def open_batches(directory: Path, url: str | None) -> BatchStore:
    """Open the database in `directory`, or at `url`."""
    engine = open_database(url, directory)
    return BatchStore(engine, FileStore(engine, directory, reserve_bytes=0))


def main() -> None:
    arguments = json.loads(sys.argv[1])
    directory = Path(arguments["directory"])
    calculator = RecordingCalculator(directory / RECORD, arguments["line_s"])
    options = WorkerOptions(**arguments["options"])
    worker = BatchWorker(open_batches(directory, arguments["url"]), directory, calculator, options=options)
    asyncio.run(worker.run())


if __name__ == "__main__":
    main()
