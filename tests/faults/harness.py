"""What the tests of this package ask of a service with planted faults, and what they check."""

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
STEADY, SHAKY = "steady", "shaky"
"""Two models of every service here. Faults are only ever planted in the second."""
_WORDS = 9
"""In a text; so any of them can share a batch."""
TRUE = 0.999
"""Cosine from which a vector is that of its text: the same text in another batch, or at fp32, comes nearer."""


class FaultyService(Service):
    """A real service with planted faults, and references for its texts."""

    def __init__(self, directory: Path, *, patches: dict[str, Any] | None = None, **settings: str) -> None:
        self.control = Control(directory / "faults")
        self._references: dict[str, NDArray[np.float32]] = {}
        self._corpus = Corpus(seed=5)
        settings["MODEL_MAPPING"] = json.dumps({alias: {"name": BUNDLED} for alias in (STEADY, SHAKY)})
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr("tests.service.COMMAND", [sys.executable, "-m", "tests.faults.service"])
            monkeypatch.setenv("PYTHONPATH", str(ROOT))
            monkeypatch.setenv("FAULTS_DIR", str(directory / "faults"))
            monkeypatch.setenv("FAULTS_PATCH", json.dumps(patches or {}))
            super().__init__(directory, stderr=None, **settings)

    def texts(self, count: int, *words: Fault) -> list[str]:
        """Return new texts of one length, each with the words of these faults, and remember what their vectors are."""
        plain, own = set(WORDS.values()), [WORDS[word] for word in words]
        texts: list[str] = []
        while len(texts) < count:
            for text in self._corpus.texts("short", count):
                drawn = text.split()[: _WORDS - len(own)]
                if len(drawn) + len(own) == _WORDS and plain.isdisjoint(drawn):
                    texts.append(" ".join([*drawn, *own]))
        texts = texts[:count]
        self.control.arm("calm", STEADY)
        response = self.embed(texts, model=STEADY)
        self.control.disarm("calm", STEADY)
        assert response.status_code == 200, response.text
        self._references |= dict(zip(texts, vectors_of(response), strict=True))
        return texts

    def is_right(self, response: httpx.Response, texts: Sequence[str]) -> bool:
        """Whether an answer holds the vectors of these texts, in their order."""
        if response.status_code != 200:
            return False
        expected = np.stack([self._references[text] for text in texts])
        found = vectors_of(response)
        return found.shape == expected.shape and bool((cosines(found, expected) > TRUE).all())

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
        """Keep all lanes of a model in the middle of a batch: what is asked in the block waits until its end.

        Yields the answers, to come, of the requests that do it.
        """
        self.control.arm("hang", alias)
        streams, before = self.streams(alias), len(self._hangs(alias))
        texts = self.texts(streams, "hang")
        asked = []
        with ThreadPoolExecutor(streams) as pool:
            try:
                for number, text in enumerate(texts, before + 1):
                    asked.append(pool.submit(self.embed, text, model=alias))
                    wait_until(lambda number=number: len(self._hangs(alias)) >= number)
                yield asked
            finally:
                self.control.disarm("hang", alias)
        for text, answer in zip(texts, asked, strict=True):
            assert self.is_right(answer.result(), [text])

    def _hangs(self, alias: str) -> list[dict[str, Any]]:
        return self.control.events("fault", kind="hang", alias=alias)

    def together(self, requests: Sequence[Sequence[str]], alias: str) -> list[httpx.Response]:
        """Ask all at once, and so that they wait together when the model's lanes become free: they share batches."""
        with ThreadPoolExecutor(len(requests)) as pool:
            with self.held(alias):
                asked = [pool.submit(self.embed, list(texts), model=alias) for texts in requests]
                wait_until(lambda: self.waiting(alias) == sum(map(len, requests)))
            return [answer.result() for answer in asked]

    @contextmanager
    def undisturbed(self, alias: str = STEADY) -> Iterator[None]:
        """Ask a model one text after the other while the block runs; each answer must be the right one."""
        texts = self.texts(8)
        answers: list[bool] = []
        over = threading.Event()

        def ask() -> None:
            while not over.is_set():
                text = texts[len(answers) % len(texts)]
                answers.append(self.is_right(self.embed(text, model=alias), [text]))
                time.sleep(0.02)

        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(ask)
            try:
                yield
                # At least one that began and ended after what happened in the block.
                enough = len(answers) + 2
                wait_until(lambda: len(answers) >= enough or asking.done())
            finally:
                over.set()
            asking.result()
        assert all(answers), f"{answers.count(False)} of {len(answers)} answers of {alias} were wrong or none"


def vectors_of(response: httpx.Response) -> NDArray[np.float32]:
    """Return the vectors of an answer, float32 of shape (inputs, dimension)."""
    data = response.json()["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    return np.array([item["embedding"] for item in data], dtype=np.float32)


def cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cosine of each row of `left` with the same row of `right`; both have rows of length 1."""
    products: NDArray[np.float32] = np.einsum("ij,ij->i", left, right)
    return products
