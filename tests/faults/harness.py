"""A service with planted faults, and checks of its responses."""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.texts import Corpus
from tests.faults.planted import WORDS, Control
from tests.service import BUNDLED, Service, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Future

    import httpx
    from numpy.typing import NDArray

    from tests.faults.planted import Fault

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.faults.service"]
STEADY, SHAKY = "steady", "shaky"
"""The two models of each service. Faults are planted in the second one only."""
_WORDS = 9
"""Words of each text, so that all texts can share a batch."""
MIN_COSINE = 0.999
"""Lowest cosine to the reference of a correct vector. The same text in another batch or at fp32 is closer."""


class FaultyService(Service):
    """A real service with planted faults, and reference vectors of its texts."""

    def __init__(
        self,
        directory: Path,
        *,
        timings: dict[str, Any] | None = None,
        supervisor_timings: dict[str, Any] | None = None,
        **settings: str,
    ) -> None:
        """Start the service.

        Args:
            directory: Its working directory.
            timings: Changes to `serving.config.Timings`.
            supervisor_timings: Changes to `process.supervisor.SupervisorTimings`.
            settings: Its settings.
        """
        self.control = Control(directory / "faults")
        self._references: dict[str, NDArray[np.float32]] = {}
        self._corpus = Corpus(seed=5)
        settings.setdefault("RESULT_CACHE_MB", "0")  # a kept vector would be returned by a model that fails
        settings["MODEL_MAPPING"] = json.dumps(
            # Two models, because their settings differ.
            {STEADY: {"name": BUNDLED}, SHAKY: {"name": BUNDLED, "dimensions": [1]}}
        )
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("PYTHONPATH", str(ROOT))
            monkeypatch.setenv("FAULTS_DIR", str(directory / "faults"))
            monkeypatch.setenv("FAULTS_TIMINGS", json.dumps(timings or {}))
            monkeypatch.setenv("FAULTS_SUPERVISOR_TIMINGS", json.dumps(supervisor_timings or {}))
            super().__init__(directory, command=COMMAND, **settings)

    def texts(self, count: int, *words: Fault) -> list[str]:
        """Return new texts of one length with the words of these faults, and record their reference vectors."""
        reserved, faults = set(WORDS.values()), [WORDS[word] for word in words]
        texts: list[str] = []
        while len(texts) < count:
            for text in self._corpus.texts("short", count):
                drawn = text.split()[: _WORDS - len(faults)]
                if len(drawn) + len(faults) == _WORDS and reserved.isdisjoint(drawn):
                    texts.append(" ".join([*drawn, *faults]))
        texts = texts[:count]
        self.control.arm("calm", STEADY)
        response = self.embed(texts, model=STEADY)
        self.control.disarm("calm", STEADY)
        assert response.status_code == 200, response.text
        self._references |= dict(zip(texts, vectors_of(response), strict=True))
        return texts

    def is_correct(self, response: httpx.Response, texts: Sequence[str]) -> bool:
        """Return whether a response has the vectors of these texts, in their order."""
        if response.status_code != 200:
            return False
        expected = np.stack([self._references[text] for text in texts])
        vectors = vectors_of(response)
        return vectors.shape == expected.shape and bool((cosines(vectors, expected) > MIN_COSINE).all())

    def state(self, alias: str) -> str:
        state: str = self.http.get("/ready").json()["models"][alias]["state"]
        return state

    def streams(self, alias: str) -> int:
        streams: int = self.control.events("loaded", alias=alias)[-1]["streams"]
        return streams

    def waiting(self, alias: str) -> float:
        return self.figure("emb_provider_queue_inputs", model=alias)

    @contextmanager
    def held(self, alias: str) -> Iterator[list[Future[httpx.Response]]]:
        """Block all streams of a model within a batch, so that later requests wait until the end of the block.

        Yields:
            The requests that block the streams.
        """
        self.control.arm("hang", alias)
        streams, before = self.streams(alias), len(self._hangs(alias))
        texts = self.texts(streams, "hang")
        requests = []
        with ThreadPoolExecutor(streams) as pool:
            try:
                for number, text in enumerate(texts, before + 1):
                    requests.append(pool.submit(self.embed, text, model=alias))
                    wait_until(lambda number=number: len(self._hangs(alias)) >= number)
                yield requests
            finally:
                self.control.disarm("hang", alias)
        for text, request in zip(texts, requests, strict=True):
            assert self.is_correct(request.result(), [text])

    def _hangs(self, alias: str) -> list[dict[str, Any]]:
        return self.control.events("fault", kind="hang", alias=alias)

    def embed_together(self, texts: Sequence[Sequence[str]], alias: str) -> list[httpx.Response]:
        """Send a request for each list of texts, so that they wait together and share batches."""
        with ThreadPoolExecutor(len(texts)) as pool:
            with self.held(alias):
                requests = [pool.submit(self.embed, list(inputs), model=alias) for inputs in texts]
                wait_until(lambda: self.waiting(alias) == sum(map(len, texts)))
            return [request.result() for request in requests]

    @contextmanager
    def undisturbed(self, alias: str = STEADY) -> Iterator[None]:
        """Send requests to a model while the block runs. Each response must be correct."""
        texts = self.texts(8)
        results: list[bool] = []
        is_over = threading.Event()

        def send_requests() -> None:
            while not is_over.is_set():
                text = texts[len(results) % len(texts)]
                results.append(self.is_correct(self.embed(text, model=alias), [text]))
                time.sleep(0.02)

        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(send_requests)
            try:
                yield
                # At least one request that was sent after the end of the block.
                enough = len(results) + 2
                wait_until(lambda: len(results) >= enough or sending.done())
            finally:
                is_over.set()
            sending.result()
        assert all(results), f"{results.count(False)} of {len(results)} responses of {alias} were not correct"


def vectors_of(response: httpx.Response) -> NDArray[np.float32]:
    """Return the vectors of a response, float32 of shape (inputs, dimension)."""
    data = response.json()["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    return np.array([item["embedding"] for item in data], dtype=np.float32)


def cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cosine of each row of `left` with the same row of `right`. All rows must have length 1."""
    products: NDArray[np.float32] = np.einsum("ij,ij->i", left, right)
    return products
