"""The queue of a model: streams, batches, fairness, cancellation, limits, and batches that hang."""

from __future__ import annotations

import asyncio
from contextvars import copy_context
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.errors import DimensionsError, ModelNotReadyError, QueueFullError
from emb_model_provider.serving.config import EngineConfig, batch_policy
from emb_model_provider.serving.engine import EmbedOptions
from emb_model_provider.serving.jobs import InferenceJob, trace_context
from emb_model_provider.serving.scheduler import BatchScheduler
from emb_model_provider.settings import BatchSettings
from tests.serving.fakes import FakeBackend, describe, expected
from tests.serving.helpers import different, ids, started_engine, until

if TYPE_CHECKING:
    from emb_model_provider.serving.jobs import BatchRecord, StageRecord

pytestmark = pytest.mark.usefixtures("short_collections")

DEFAULTS = EmbedOptions()


async def test_streams_run_batches_in_parallel() -> None:
    """A backend with two streams runs on two threads, and each request gets its own vectors."""
    async with started_engine(streams=2) as run:
        run.backend.gate.clear()
        tasks = [asyncio.create_task(run.embed(*(f"w{n} w{m}" for m in range(30)))) for n in range(30)]
        await until(lambda: run.backend.running_batches == 2)
        run.backend.gate.set()
        for n, vectors in enumerate(await asyncio.gather(*tasks)):
            assert vectors.tolist() == [expected(ids(f"w{n}", f"w{m}")) for m in range(30)]
    assert run.backend.threads == {"model-fake", "model-fake-1"}
    assert run.backend.closed


async def test_requests_that_arrive_during_a_batch_share_the_next_one() -> None:
    """While the model is busy, the next batch collects inputs of several requests."""
    async with started_engine() as run:
        holding = await run.hold()
        others = [asyncio.create_task(run.embed(f"w{n}")) for n in range(10)]
        await run.until_waiting(10)
        run.backend.gate.set()
        await asyncio.gather(holding, *others)
        assert [len(batch) for batch in run.backend.batches] == [1, 10]


async def test_waiting_and_running_requests_are_counted() -> None:
    """A request waits until its first batch, and runs until it is answered, however many inputs it has."""
    async with started_engine(config={"batching": BatchSettings(max_batch_size=1)}) as run:
        assert run.engine.count_requests() == (0, 0)
        holding = await run.hold()
        others = [asyncio.create_task(run.embed(*different(3))) for _ in range(2)]
        await run.until_waiting(6)
        assert run.engine.count_requests() == (2, 1)
        run.backend.gate.set()
        await asyncio.gather(holding, *others)
        assert run.engine.count_requests() == (0, 0)


async def test_stages_of_a_request_are_recorded() -> None:
    """With the tokens that were processed; a request that fails has no stages."""
    stages: list[StageRecord] = []
    async with started_engine(config={"on_stages": stages.append}) as run:
        await run.embed("w1 w2", "w3")
        with pytest.raises(DimensionsError):
            await run.embed("w1", dimensions=1)
    (stage,) = stages
    assert (stage.model, stage.inputs, stage.tokens, stage.truncated) == ("fake", 2, 4 + 3, 0)
    assert stage.submitted_at is not None
    assert stage.started_at <= stage.started_at + stage.tokenize_s <= stage.submitted_at


async def test_batches_are_linked_to_the_requests_that_they_serve() -> None:
    """A batch of inputs of several requests has the trace of each of them, once."""
    async with started_engine() as run:
        holding = await run.hold()
        tasks = []
        for name in ("first", "second"):
            context = copy_context()
            context.run(trace_context.set, name)
            tasks.append(asyncio.create_task(run.embed(f"w5 {name}", "w6"), context=context))
        await run.until_waiting(4)
        run.backend.gate.set()
        await asyncio.gather(holding, *tasks)
    assert [sorted(map(str, record.traces)) for record in run.records[-2:]] == [[], ["first", "second"]]


async def test_large_request_does_not_delay_a_small_one() -> None:
    """A request of one text runs long before the end of an earlier request of 2048 texts."""
    async with started_engine() as run:
        holding = await run.hold()
        large = asyncio.create_task(run.embed(*(f"{word} w3" for word in different(2048))))
        await run.until_waiting(2048)
        small = asyncio.create_task(run.embed("w4 w4"))
        await run.until_waiting(2049)
        run.backend.gate.set()
        await asyncio.gather(holding, small, large)
        first = next(i for i, batch in enumerate(run.backend.batches) if ids("w4", "w4") in batch)
        assert first <= 2
        assert len(run.backend.batches) > 30


async def test_cancelled_request_leaves_the_queue() -> None:
    """The waiting inputs of a cancelled request do not run."""
    async with started_engine() as run:
        holding = await run.hold()
        cancelled = asyncio.create_task(run.embed(*different(500)))
        await run.until_waiting(500)
        cancelled.cancel()
        await run.until_waiting(0)
        run.backend.gate.set()
        await holding
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await run.embed("w1")
        assert sum(map(len, run.backend.batches)) == 2


async def test_small_batch_waits_for_more_inputs() -> None:
    """Fewer inputs than MIN_BATCH_SIZE wait for MAX_WAIT_TIME_MS; enough inputs start at once."""
    batching = BatchSettings(min_batch_size=8, max_wait_time_ms=200)
    async with started_engine(config={"batching": batching}) as run:
        embeddings = await run.engine.embed(["w1"], DEFAULTS)
        assert embeddings.timing.queue_s >= 0.2
    batching = BatchSettings(min_batch_size=8, max_wait_time_ms=60_000)
    async with started_engine(config={"batching": batching}) as run:
        results = await asyncio.gather(*(run.engine.embed([text], DEFAULTS) for text in different(8)))
        assert max(result.timing.queue_s for result in results) < 60
        assert [len(batch) for batch in run.backend.batches] == [8]


async def test_full_queue_rejects_requests() -> None:
    """A request that exceeds MAX_QUEUE_TOKENS is rejected at once. An empty queue accepts any request."""
    async with started_engine(config={"batching": BatchSettings(max_queue_tokens=50)}) as run:
        assert len(await run.embed(*different(100))) == 100
        holding = await run.hold()
        waiting = [asyncio.create_task(run.embed(*different(inputs))) for inputs in (15, 14)]
        await run.until_waiting(29)
        with pytest.raises(QueueFullError, match="87 tokens") as caught:
            await run.embed(*different(3))
        assert caught.value.retry_after_s > 0
        run.backend.gate.set()
        await asyncio.gather(holding, *waiting)


async def test_request_larger_than_the_queue_does_not_block_small_ones() -> None:
    """Small requests overtake it, so they are accepted. A second request of its size is rejected."""
    async with started_engine(config={"batching": BatchSettings(max_queue_tokens=50)}) as run:
        holding = await run.hold()
        large = asyncio.create_task(run.embed(*different(100)))
        await run.until_waiting(100)
        small = asyncio.create_task(run.embed("w3", "w4"))
        await run.until_waiting(102)
        with pytest.raises(QueueFullError, match="306 tokens"):
            await run.embed(*different(100))
        run.backend.gate.set()
        await asyncio.gather(holding, large, small)


async def test_without_a_limit_in_tokens_the_queue_is_limited_by_memory() -> None:
    """A request that does not fit is rejected with the time that the excess takes. An empty queue accepts any request."""
    async with started_engine(config={"queue_bytes": 40_000}) as run:
        assert len(await run.embed(*different(1000))) == 1000
        holding = await run.hold()
        large = asyncio.create_task(run.embed(*different(200)))
        await run.until_waiting(200)
        with pytest.raises(QueueFullError, match="kB of memory") as caught:
            await run.embed(*different(200))
        assert 0 < caught.value.retry_after_s < 1
        small = asyncio.create_task(run.embed("w4"))
        await run.until_waiting(201)
        run.backend.gate.set()
        await asyncio.gather(holding, large, small)
        assert len(await run.embed(*different(200))) == 200


async def test_error_while_recording_metrics_fails_no_request() -> None:
    """Recording a batch is not part of answering it."""

    def on_batch(_: BatchRecord) -> None:
        raise ValueError("planted")

    async with started_engine(on_batch=on_batch) as run:
        assert (await run.embed("w1")).tolist() == [expected(ids("w1"))]
        assert not run.changes


@pytest.mark.parametrize("largest", [1_000_000, 4])
async def test_small_batches_do_not_lower_the_measured_speed(largest: int) -> None:
    """They take a GPU as long as large ones, so they say nothing of its speed. Batches of a quarter of the budget do."""
    backend = FakeBackend(describe(device="cuda:0"))
    policy = batch_policy(BatchSettings(max_batch_tokens=largest), backend.description)
    scheduler = BatchScheduler("fake", EngineConfig(), lambda _: None)
    scheduler.open(backend, policy)
    backend.gate.clear()
    running = asyncio.create_task(asyncio.to_thread(scheduler.run, backend))
    job = InferenceJob(TokenBatch(ids=[[2, 4, 3]], prompt_lengths=[0]), ("dense",))
    scheduler.submit(job)
    assert await asyncio.to_thread(backend.entered.wait, 60)
    await asyncio.sleep(0.01)  # 3 tokens in more than 10 ms: at most 300 per second
    backend.gate.set()
    await job.result
    assert (scheduler.tokens_per_s == policy.assumed_tokens_per_s) is (largest > 4)
    scheduler.stop()
    assert await running is None


async def test_hang_is_reported() -> None:
    """A model that hangs says so and rejects requests. After the end of the batch it continues."""
    async with started_engine(config={"watchdog_s": 0.5}) as run:
        assert run.engine.hang_report == ""
        holding = await run.hold()
        await until(lambda: run.engine.hang_report)
        assert "a batch of 1 inputs has been running for" in run.engine.hang_report
        with pytest.raises(ModelNotReadyError, match="hangs"):
            await run.embed("w2")
        run.backend.gate.set()
        assert (await holding).tolist() == [expected(ids("w1"))]
        assert run.engine.hang_report == ""
        assert (await run.embed("w2")).tolist() == [expected(ids("w2"))]


async def test_other_stream_continues_while_one_hangs() -> None:
    """A model that hangs on one stream accepts requests for the other."""
    async with started_engine(streams=2, config={"watchdog_s": 0.5}) as run:
        holding = await run.hold()
        await until(lambda: run.engine.hang_report)
        run.backend.let_through.set()
        assert (await run.embed("w2")).tolist() == [expected(ids("w2"))]
        assert not holding.done()
        run.backend.gate.set()
        assert (await holding).tolist() == [expected(ids("w1"))]
