"""An engine around a fake backend, as the tests of serving use it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from emb_model_provider.errors import LoadError
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.serving.engine import EmbedOptions, Engine
from emb_model_provider.settings import BatchSettings, LimitSettings
from tests.serving.fakes import IDS, FakeBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import numpy as np

    from emb_model_provider.backends.base import ModelDescription
    from emb_model_provider.serving.jobs import BatchRecord


class Running:
    """An engine and what a test may look at."""

    def __init__(
        self,
        engine: Engine,
        made: list[FakeBackend],
        records: list[BatchRecord],
        changes: list[tuple[str, str]],
    ) -> None:
        self.engine, self.made, self.records, self.changes = engine, made, records, changes
        self.backend.batches.clear()  # the first, of the load itself
        self.backend.entered.clear()

    @property
    def backend(self) -> FakeBackend:
        """The one that was loaded last."""
        return self.made[-1]

    async def embed(self, *texts: str, **options: object) -> np.ndarray:
        set_results = await self.engine.embed(texts, EmbedOptions(**options))  # type: ignore[arg-type]
        return set_results.vectors

    async def hold(self) -> asyncio.Task[np.ndarray]:
        """Start a request that keeps the model busy until the gate opens."""
        self.backend.gate.clear()
        self.backend.entered.clear()
        holding = asyncio.create_task(self.embed("w1"))
        assert await asyncio.to_thread(self.backend.entered.wait, 60)
        return holding

    async def until_waiting(self, inputs: int) -> None:
        async with asyncio.timeout(60):
            while self.engine.waiting_inputs != inputs:
                await asyncio.sleep(0.001)


@asynccontextmanager
async def running(
    description: ModelDescription | None = None,
    *,
    streams: int = 1,
    batching: BatchSettings | None = None,
    limits: LimitSettings | None = None,
    watchdog_s: float = 60.0,
    may_load: Callable[[int], bool] = lambda _loads: True,
    on_batch: Callable[[BatchRecord], None] | None = None,
    **spec: object,
) -> AsyncIterator[Running]:
    made: list[FakeBackend] = []
    records: list[BatchRecord] = []
    changes: list[tuple[str, str]] = []

    def load() -> FakeBackend:
        if not may_load(len(made)):
            raise LoadError("no weights any more")
        made.append(FakeBackend(description, streams))
        return made[-1]

    with ThreadPoolExecutor(1) as executor:
        engine = await Engine.start(
            ModelSpec(alias="fake", name="fake", **spec),  # type: ignore[arg-type]
            load,
            batching=batching or BatchSettings(),
            limits=limits or LimitSettings(),
            executor=executor,
            on_batch=on_batch or records.append,
            watchdog_s=watchdog_s,
            on_change=lambda change, reason: changes.append((change, reason)),
        )
        try:
            yield Running(engine, made, records, changes)
        finally:
            for backend in made:
                backend.gate.set()
            await asyncio.to_thread(engine.stop)


def ids(*words: str) -> list[int]:
    """Return the token ids of a text of these words."""
    return [2, *(IDS[word] for word in words), 3]
