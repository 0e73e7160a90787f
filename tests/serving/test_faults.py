"""What goes wrong in a model's threads: who hears of it, and how the model comes back. With a fake backend."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import InferenceError, ModelNotReadyError
from emb_model_provider.serving import model_thread as worker
from emb_model_provider.serving.scheduler import BatchScheduler
from emb_model_provider.settings import BatchSettings
from tests.serving.fakes import BREAKS, NEVER_FINITE, NOT_FINITE, expected
from tests.serving.running import ids, running

if TYPE_CHECKING:
    import numpy as np

    from emb_model_provider.serving.batcher import Batch
    from emb_model_provider.serving.jobs import BatchRecord, EmbeddingJob
    from tests.serving.running import Running


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_RESTART_PAUSES_S", (0.0, 0.0, 0.0))


async def ask(run: Running, count: int, *also: str) -> list[asyncio.Task[np.ndarray]]:
    """Let requests of one text each wait together behind a batch that is held, then let it go."""
    holding = await run.hold()
    asked = [asyncio.create_task(run.embed(f"w{n} w{n}")) for n in range(count)]
    asked += [asyncio.create_task(run.embed(text)) for text in also]
    async with asyncio.timeout(60):
        while len(run.engine._scheduler._pending.waiting) != 1 + len(asked):
            await asyncio.sleep(0.001)
    run.backend.gate.set()
    await holding
    return asked


def right(count: int) -> list[list[float]]:
    return [expected(ids(f"w{n}", f"w{n}")) for n in range(count)]


# --- vectors that are not finite ----------------------------------------------------------------------


async def test_a_vector_that_is_not_finite_is_computed_again_at_fp32() -> None:
    """What overflowed in a smaller type is answered right, and so is its neighbour."""
    async with running() as run:
        asked = await ask(run, 3, f"w5 {NOT_FINITE}")
        answers = [(await task)[0].tolist() for task in asked]
        assert answers == [*right(3), expected(ids("w5", NOT_FINITE))]


async def test_a_vector_that_is_never_finite_is_never_sent() -> None:
    """NaN at fp32 too fails the request that got it, and no other."""
    async with running() as run:
        *good, bad = await ask(run, 3, NEVER_FINITE)
        with pytest.raises(InferenceError, match="not finite"):
            await bad
        assert [(await task)[0].tolist() for task in good] == right(3)
        assert not run.changes


# --- memory -------------------------------------------------------------------------------------------


async def test_batches_that_do_not_fit_run_in_halves_and_stay_small_for_a_while() -> None:
    """Nobody hears of it where smaller batches fit, and the next ones are small from the start."""
    async with running() as run:
        run.backend.most_tokens = 20
        asked = await ask(run, 32)
        assert [(await task)[0].tolist() for task in asked] == right(32)
        run.backend.batches.clear()
        asked = await ask(run, 32)
        assert [(await task)[0].tolist() for task in asked] == right(32)
        assert max(len(batch) * len(batch[0]) for batch in run.backend.batches) <= 20


async def test_an_input_too_large_for_the_memory_lowers_no_budget() -> None:
    """One that there is no memory for, alone, fails alone; the batches of others stay as large as they were."""
    async with running() as run:
        run.backend.most_tokens = 15
        holding = await run.hold()
        bad = asyncio.create_task(run.embed(" ".join(["w1"] * 14)))
        await run.until_waiting(1)
        run.backend.gate.set()
        await holding
        with pytest.raises(InferenceError):
            await bad
        run.backend.most_tokens = None
        run.backend.batches.clear()
        asked = await ask(run, 32)
        assert [(await task)[0].tolist() for task in asked] == right(32)
        assert max(map(len, run.backend.batches)) == 32


# --- threads that end, models that break --------------------------------------------------------------


async def test_a_model_that_answers_nothing_any_more_is_loaded_anew() -> None:
    """Requests that were waiting or running when it broke are answered right, by the model loaded anew."""
    async with running() as run:
        broken = run.backend
        asked = await ask(run, 20)
        broken.broken = True
        asked += [asyncio.create_task(run.embed(f"w{n} w{n}")) for n in range(20, 40)]
        assert [(await task)[0].tolist() for task in asked] == right(40)
        assert len(run.made) == 2
        assert broken.closed
        assert [change for change, _ in run.changes] == ["restarting", "running"]
        assert "RuntimeError: planted" in run.changes[0][1]


@pytest.mark.parametrize("streams", [1, 2])
async def test_an_input_that_breaks_the_model_each_time_fails_alone(streams: int) -> None:
    """It is tried once more, by itself; whoever shared its batch, or ran beside it, is answered."""
    async with running(streams=streams, batching=BatchSettings(max_batch_size=8)) as run:
        *good, bad = await ask(run, 20, f"w5 {BREAKS}")
        with pytest.raises(InferenceError, match="broke down each time"):
            await bad
        assert [(await task)[0].tolist() for task in good] == right(20)
        assert (await run.embed("w1 w1"))[0].tolist() == right(2)[1]
        assert len(run.made) == 3


async def test_a_thread_that_ends_brings_its_model_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in a lane's own code costs nobody an answer, whichever lane it is."""
    own, ends = BatchScheduler._finish, threading.Semaphore(1)

    def finish(
        self: BatchScheduler, stream: int, batch: Batch[EmbeddingJob], ended: float, *, took: float
    ) -> None:
        if len(batch.members) > 1 and ends.acquire(blocking=False):
            raise SystemExit(1)
        own(self, stream, batch, ended, took=took)

    monkeypatch.setattr(BatchScheduler, "_finish", finish)
    async with running(streams=2) as run:
        asked = [asyncio.create_task(run.embed(*(f"w{n} w{n}" for n in range(20)))) for _ in range(20)]
        for task in asked:
            assert (await task).tolist() == right(20)
        assert [change for change, _ in run.changes] == ["restarting", "running"]


async def test_figures_that_cannot_be_kept_cost_no_answer() -> None:
    """What counts batches is no part of answering."""

    def on_batch(_: BatchRecord) -> None:
        raise ValueError("planted")

    async with running(on_batch=on_batch) as run:
        assert (await run.embed("w1")).tolist() == [expected(ids("w1"))]
        assert not run.changes


async def test_a_model_that_cannot_be_loaded_anew_is_given_up() -> None:
    """After a few tries whoever waits for it, and whoever comes, hears why."""
    async with running(may_load=lambda loads: loads == 0) as run:
        run.backend.broken = True
        asked = await asyncio.gather(run.embed("w1"), run.embed("w2"), return_exceptions=True)
        for set_results in asked:
            assert isinstance(set_results, ModelNotReadyError)
            assert "no weights any more. It was loaded anew 3 times" in str(set_results)
        with pytest.raises(ModelNotReadyError, match="no weights any more") as caught:
            await run.embed("w3")
        assert caught.value.retry_after_s > 0
        assert [change for change, _ in run.changes] == ["restarting"] * 3 + ["failed"]


async def test_requests_that_come_while_a_model_is_loaded_anew_wait_for_it() -> None:
    """Nothing is refused for a model that is on its way back."""
    back = threading.Event()
    async with running(may_load=lambda loads: loads == 0 or back.wait(60)) as run:
        run.backend.broken = True
        before = asyncio.create_task(run.embed("w1 w1"))
        async with asyncio.timeout(60):
            while not run.changes:
                await asyncio.sleep(0.001)
        during = asyncio.create_task(run.embed("w2 w2"))
        gone = asyncio.create_task(run.embed("w3"))
        await run.until_waiting(2)
        gone.cancel()
        before_gone = asyncio.create_task(asyncio.sleep(0))
        await before_gone
        back.set()
        assert (await before)[0].tolist() == right(2)[1]
        assert (await during)[0].tolist() == right(3)[2]
        assert not any(ids("w3") in batch for batch in run.backend.batches)


# --- what hangs ---------------------------------------------------------------------------------------


async def test_a_batch_that_does_not_end_is_noticed() -> None:
    """The model says so, takes no more, and goes on where it was once the batch ends."""
    async with running(watchdog_s=0.05) as run:
        assert run.engine.hang_report == ""
        holding = await run.hold()
        async with asyncio.timeout(60):
            while not run.engine.hang_report:
                await asyncio.sleep(0.01)
        assert "a batch of 1 inputs has been running for" in run.engine.hang_report
        with pytest.raises(ModelNotReadyError, match="hangs"):
            await run.embed("w2")
        run.backend.gate.set()
        assert (await holding).tolist() == [expected(ids("w1"))]
        assert run.engine.hang_report == ""
        assert (await run.embed("w2")).tolist() == [expected(ids("w2"))]


async def test_another_lane_goes_on_where_one_hangs() -> None:
    """Half a model is better than none."""
    async with running(streams=2, watchdog_s=0.05) as run:
        holding = await run.hold()
        async with asyncio.timeout(60):
            while not run.engine.hang_report:
                await asyncio.sleep(0.01)
        second = asyncio.create_task(run.embed("w2"))
        async with asyncio.timeout(60):
            while run.backend.inside < 2:
                await asyncio.sleep(0.001)
        run.backend.gate.set()
        await asyncio.gather(holding, second)


async def test_a_model_whose_lane_hangs_while_another_ends_takes_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It cannot come back before the lane that hangs does; then it does, and answers what it had accepted."""
    own, ends = BatchScheduler._finish, threading.Semaphore(1)

    def finish(
        self: BatchScheduler, stream: int, batch: Batch[EmbeddingJob], ended: float, *, took: float
    ) -> None:
        if ends.acquire(blocking=False):
            raise SystemExit(1)
        own(self, stream, batch, ended, took=took)

    async with running(streams=2, watchdog_s=0.05) as run:
        holding = await run.hold()
        monkeypatch.setattr(BatchScheduler, "_finish", finish)
        # This one's lane ends as soon as it has run: let it through, and keep the other where it is.
        run.backend.let_through.set()
        other = asyncio.create_task(run.embed("w2"))
        async with asyncio.timeout(60):
            while run.engine._scheduler._crash is None or not run.engine.hang_report:
                await asyncio.sleep(0.01)
        with pytest.raises(ModelNotReadyError, match="hangs"):
            await run.embed("w3")
        run.backend.gate.set()
        assert (await holding).tolist() == [expected(ids("w1"))]
        assert (await other).tolist() == [expected(ids("w2"))]


async def test_stopping_does_not_wait_for_ever() -> None:
    """A batch that does not end keeps nobody from ending the process."""
    async with running() as run:
        holding = await run.hold()
        assert not await asyncio.to_thread(run.engine.stop, 0.05)
        run.backend.gate.set()
        await holding
