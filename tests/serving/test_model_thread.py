"""The thread of a model: loading, restarts after crashes, and stopping."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from emb_model_provider.backends.base import Outputs
from emb_model_provider.errors import InferenceError, LoadError, ModelNotReadyError, ThreadLimitError
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.serving.config import EngineConfig
from emb_model_provider.serving.engine import Engine
from emb_model_provider.serving.jobs import in_background
from emb_model_provider.settings import BatchSettings
from tests.service import no_more_threads
from tests.serving.fakes import BREAKS, LOSES_GPU, FakeBackend, expected
from tests.serving.helpers import different, expected_vectors, ids, started_engine, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.serving.jobs import BatchRecord

pytestmark = pytest.mark.usefixtures("short_collections")


async def start(load: Callable[[], FakeBackend]) -> None:
    with ThreadPoolExecutor(1) as executor:
        spec = ModelSpec(alias="fake", name="fake")
        await Engine(spec, load, EngineConfig(), executor, lambda _change, _reason: None).start()


class CrashOnce:
    """An `on_batch` callback that crashes the stream of one batch."""

    def __init__(self, *, min_inputs: int = 1) -> None:
        self.armed = threading.Semaphore(1)
        self._min_inputs = min_inputs

    def __call__(self, record: BatchRecord) -> None:
        if record.inputs >= self._min_inputs and self.armed.acquire(blocking=False):
            raise SystemExit(1)


# --- loading ------------------------------------------------------------------------------------------


async def test_backend_is_used_on_one_thread() -> None:
    """The backend is created, run and closed on the same thread."""
    async with started_engine() as run:
        await asyncio.gather(*(run.embed(f"w{n}") for n in range(50)))
    assert run.backend.threads == {"model-fake"}
    assert run.backend.closed


async def test_error_of_the_load_is_raised() -> None:
    """`Engine.start` raises the error of the load."""

    def load() -> FakeBackend:
        raise LoadError("no such weights")

    with pytest.raises(LoadError, match="no such weights"):
        await start(load)


async def test_model_whose_first_vector_is_not_finite_is_not_served() -> None:
    """A model that returns NaN for the test text fails to load, and its backend is closed."""
    backends: list[FakeBackend] = []

    class NanBackend(FakeBackend):
        def run(self, batch: object) -> Outputs:
            return Outputs(dense=np.full((1, 4), np.nan, dtype=np.float32))

    def load() -> FakeBackend:
        backends.append(NanBackend())
        return backends[0]

    with pytest.raises(LoadError, match="is not finite: its weights"):
        await start(load)
    assert backends[0].closed


async def test_model_whose_thread_cannot_be_started_is_not_served() -> None:
    """The error says what to do, and no caller waits."""
    with no_more_threads(), pytest.raises(ThreadLimitError, match="ulimit -u"):
        await start(FakeBackend)


async def test_model_runs_with_the_streams_that_can_be_started(caplog: pytest.LogCaptureFixture) -> None:
    """Requests are answered, and a batch that hangs is noticed, although the other streams do not exist."""

    def reach_limit(_: int) -> bool:
        threading.stack_size(2**46)
        return True

    try:
        async with started_engine(streams=3, can_load=reach_limit, config={"watchdog_s": 0.5}) as run:
            vectors = await asyncio.gather(*(run.embed(text) for text in different(5)))
            assert len(vectors) == 5
            assert "runs with 1 of 3 streams" in caplog.text
            threading.stack_size(0)
            await run.hold()
            await until(lambda: run.engine.hang_report)
            with pytest.raises(ModelNotReadyError, match="hangs"):
                await run.embed("w2")
    finally:
        threading.stack_size(0)


# --- restarts -----------------------------------------------------------------------------------------


async def test_model_that_fails_on_everything_is_restarted() -> None:
    """The requests that were waiting or running at the crash are answered by the restarted model."""
    async with started_engine() as run:
        broken = run.backend
        tasks = await run.embed_together(20)
        broken.broken = True
        tasks += [asyncio.create_task(run.embed(f"w{n} w{n}")) for n in range(20, 40)]
        assert [(await task)[0].tolist() for task in tasks] == expected_vectors(40)
        assert len(run.backends) == 2
        assert broken.closed
        assert [change for change, _ in run.changes] == ["restarting", "running"]
        assert "RuntimeError: planted" in run.changes[0][1]


@pytest.mark.parametrize("streams", [1, 2])
async def test_input_that_crashes_the_model_fails_alone(streams: int) -> None:
    """It runs again, exclusively. The requests that shared its batch or ran next to it are answered."""
    config = {"batching": BatchSettings(max_batch_size=8)}
    async with started_engine(streams=streams, config=config) as run:
        *good, bad = await run.embed_together(20, f"w5 {BREAKS}")
        with pytest.raises(InferenceError, match="crashed each time"):
            await bad
        assert [(await task)[0].tolist() for task in good] == expected_vectors(20)
        assert (await run.embed("w1 w1"))[0].tolist() == expected_vectors(2)[1]
        assert len(run.backends) == 3


async def test_requests_with_one_attempt_fail_at_the_first_crash() -> None:
    """Those of batches, whose lines are then computed alone."""
    async with started_engine() as run:
        with in_background(max_attempts=1):
            bad = asyncio.create_task(run.embed("w1 w1", f"w5 {BREAKS}"))
        with pytest.raises(InferenceError, match="crashed each time"):
            await bad
        assert (await run.embed("w1 w1"))[0].tolist() == expected_vectors(2)[1]
        assert len(run.backends) == 2


async def test_crash_of_a_stream_loses_no_request() -> None:
    """An error outside the backend, on any stream, restarts the model, and all requests are answered."""
    async with started_engine(streams=2, on_batch=CrashOnce(min_inputs=2)) as run:
        tasks = [asyncio.create_task(run.embed(*(f"w{n} w{n}" for n in range(20)))) for _ in range(20)]
        for task in tasks:
            assert (await task).tolist() == expected_vectors(20)
        assert [change for change, _ in run.changes] == ["restarting", "running"]


async def test_model_that_cannot_be_restarted_fails() -> None:
    """After a few attempts, waiting and later requests fail with the reason."""
    async with started_engine(can_load=lambda loads: loads == 0) as run:
        run.backend.broken = True
        results = await asyncio.gather(run.embed("w1"), run.embed("w2"), return_exceptions=True)
        for error in results:
            assert isinstance(error, ModelNotReadyError)
            assert "the weights are gone. It was restarted 3 times" in str(error)
        with pytest.raises(ModelNotReadyError, match="the weights are gone") as caught:
            await run.embed("w3")
        assert caught.value.retry_after_s > 0
        assert [change for change, _ in run.changes] == ["restarting"] * 3 + ["failed"]


async def test_model_is_not_restarted_when_its_gpu_is_lost() -> None:
    """Every later call of CUDA fails in this process, so neither the halves of the batch nor another load can succeed."""
    async with started_engine() as run:
        tasks = await run.embed_together(7, f"w5 {LOSES_GPU}")
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, ModelNotReadyError)
            assert "illegal memory access" in error.message
            assert "EMB_PROVIDER_SUPERVISE=true" in error.message
        assert len(run.backends) == 1
        assert run.backend.closed
        assert [len(batch) for batch in run.backend.batches] == [1, 8]
        assert [change for change, _ in run.changes] == ["device lost"]


async def test_requests_wait_during_a_restart() -> None:
    """No request is rejected while the model is being restarted, and a cancelled one does not run."""
    can_restart = threading.Event()
    async with started_engine(can_load=lambda loads: loads == 0 or can_restart.wait(60)) as run:
        run.backend.broken = True
        before = asyncio.create_task(run.embed("w1 w1"))
        await until(lambda: run.changes)
        during = asyncio.create_task(run.embed("w2 w2"))
        cancelled = asyncio.create_task(run.embed("w3"))
        await run.until_waiting(2)
        cancelled.cancel()
        await run.until_waiting(1)
        can_restart.set()
        assert (await before)[0].tolist() == expected_vectors(2)[1]
        assert (await during)[0].tolist() == expected_vectors(3)[2]
        assert not any(ids("w3") in batch for batch in run.backend.batches)


async def test_model_rejects_requests_while_a_hang_delays_its_restart(caplog: pytest.LogCaptureFixture) -> None:
    """The restart waits for the stream that hangs. After it, the accepted requests are answered."""
    on_batch = CrashOnce()
    assert on_batch.armed.acquire(blocking=False)
    async with started_engine(streams=2, on_batch=on_batch, config={"watchdog_s": 0.5}) as run:
        holding = await run.hold()
        on_batch.armed.release()
        run.backend.let_through.set()
        other = asyncio.create_task(run.embed("w2"))
        await until(lambda: "crashed" in caplog.text and run.engine.hang_report)
        with pytest.raises(ModelNotReadyError, match="hangs"):
            await run.embed("w3")
        run.backend.gate.set()
        assert (await holding).tolist() == [expected(ids("w1"))]
        assert (await other).tolist() == [expected(ids("w2"))]


# --- stopping -----------------------------------------------------------------------------------------


async def test_stop_answers_accepted_requests() -> None:
    """`stop` answers the queue, closes the backend, and rejects later requests."""
    batching = BatchSettings(min_batch_size=64, max_wait_time_ms=30_000)
    async with started_engine(config={"batching": batching}) as run:
        accepted = asyncio.create_task(run.embed(*different(20)))
        await run.until_waiting(20)
        await asyncio.to_thread(run.engine.stop)
        assert len(await accepted) == 20
        assert run.backend.closed
        with pytest.raises(ModelNotReadyError, match="stopping"):
            await run.embed("w1")


async def test_stop_has_a_time_limit() -> None:
    """`stop` returns False for a model that hangs."""
    async with started_engine() as run:
        holding = await run.hold()
        assert not await asyncio.to_thread(run.engine.stop, 0.05)
        run.backend.gate.set()
        await holding
