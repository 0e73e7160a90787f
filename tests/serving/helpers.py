"""Runs an engine with a fake backend."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from emb_model_provider.errors import LoadError
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.serving.config import EngineConfig, Timings
from emb_model_provider.serving.engine import EmbedOptions, Engine
from tests.serving.fakes import IDS, FakeBackend, expected

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from concurrent.futures import Future

    import numpy as np

    from emb_model_provider.backends.base import ModelDescription
    from emb_model_provider.serving.jobs import BatchRecord

TIMEOUT_S = 60.0
"""Reached only if something is wrong."""
NO_PAUSES = Timings(restart_pauses_s=(0.0, 0.0, 0.0))


class EngineRun:
    """An engine, and what tests observe of it."""

    def __init__(
        self,
        engine: Engine,
        backends: list[FakeBackend],
        records: list[BatchRecord],
        changes: list[tuple[str, str]],
        executor: CountingExecutor,
    ) -> None:
        self.executor = executor
        self.engine, self.backends, self.records, self.changes = engine, backends, records, changes
        self.backend.batches.clear()  # the test text of the load
        self.backend.entered.clear()

    @property
    def backend(self) -> FakeBackend:
        """The backend that was loaded last."""
        return self.backends[-1]

    async def embed(self, *texts: str, **options: object) -> np.ndarray:
        embeddings = await self.engine.embed(texts, EmbedOptions(**options))  # type: ignore[arg-type]
        return embeddings.vectors

    async def hold(self) -> asyncio.Task[np.ndarray]:
        """Start a request that keeps the model busy until the gate opens."""
        self.backend.gate.clear()
        self.backend.entered.clear()
        holding = asyncio.create_task(self.embed("w1"))
        assert await asyncio.to_thread(self.backend.entered.wait, TIMEOUT_S)
        return holding

    async def until_waiting(self, inputs: int) -> None:
        """Wait until this many inputs are in the queue."""
        await until(lambda: self.engine.waiting_inputs == inputs)

    async def embed_together(self, count: int, *texts: str) -> list[asyncio.Task[np.ndarray]]:
        """Start `count` requests of one text and one for each of `texts`, so that they are queued together."""
        holding = await self.hold()
        tasks = [asyncio.create_task(self.embed(f"w{n} w{n}")) for n in range(count)]
        tasks += [asyncio.create_task(self.embed(text)) for text in texts]
        await until(lambda: self.engine.waiting_inputs + self.backend.running_inputs == 1 + len(tasks))
        self.backend.gate.set()
        await holding
        return tasks


class CountingExecutor(ThreadPoolExecutor):
    """One thread, and the number of calls that it was given."""

    def __init__(self) -> None:
        super().__init__(1)
        self.calls = 0

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:  # type: ignore[override]  # any call
        self.calls += 1
        return super().submit(*args, **kwargs)


@asynccontextmanager
async def started_engine(
    description: ModelDescription | None = None,
    *,
    streams: int = 1,
    can_load: Callable[[int], bool] = lambda _loads: True,
    on_batch: Callable[[BatchRecord], None] | None = None,
    config: dict[str, object] | None = None,
    **spec: object,
) -> AsyncIterator[EngineRun]:
    """Run an engine.

    Args:
        description: Description of the fake model.
        streams: Number of its streams.
        can_load: Whether a load succeeds, by the number of loads before it.
        on_batch: Called after each batch, instead of recording it.
        config: Changes to the engine's configuration.
        spec: Changes to the model's specification.
    """
    backends: list[FakeBackend] = []
    records: list[BatchRecord] = []
    changes: list[tuple[str, str]] = []

    def load() -> FakeBackend:
        if not can_load(len(backends)):
            raise LoadError("the weights are gone")
        backends.append(FakeBackend(description, streams))
        return backends[-1]

    with CountingExecutor() as executor:
        values = {"timings": NO_PAUSES, "on_batch": on_batch or records.append, **(config or {})}
        engine = Engine(
            ModelSpec(alias="fake", name="fake", **spec),  # type: ignore[arg-type]
            load,
            EngineConfig(**values),  # type: ignore[arg-type]
            executor,
            on_change=lambda change, reason: changes.append((change, reason)),
        )
        await engine.start()
        try:
            yield EngineRun(engine, backends, records, changes, executor)
        finally:
            for backend in backends:
                backend.gate.set()
            await asyncio.to_thread(engine.stop)


async def until(condition: Callable[[], object]) -> None:
    """Wait until `condition()` is true."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.001)


def ids(*words: str) -> list[int]:
    """Return the token ids of a text of these words."""
    return [2, *(IDS[word] for word in words), 3]


def different(count: int) -> list[str]:
    """Return different texts of one word, because identical ones are computed once."""
    return [f"w{100 + n}" for n in range(count)]


def expected_vectors(count: int) -> list[list[float]]:
    """Return the vectors of the first texts of `embed_together`."""
    return [expected(ids(f"w{n}", f"w{n}")) for n in range(count)]
