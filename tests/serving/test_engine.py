"""An engine with a backend whose answers are known: order, isolation, limits, cancellation, a clean end."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from emb_model_provider.errors import (
    DeadlineExceededError,
    DimensionsError,
    InferenceError,
    InputTooLongError,
    LoadError,
    ModelNotReadyError,
    QueueFullError,
    RequestError,
    TokenInputError,
    TooManyTokensError,
)
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.serving.engine import EmbedOptions, Engine, batch_policy
from emb_model_provider.settings import BatchSettings, LimitSettings
from tests.serving.fakes import FAILS, FakeBackend, describe, expected
from tests.serving.running import ids, running

PLAIN = EmbedOptions()


async def test_vectors_come_in_the_order_of_the_inputs() -> None:
    """Inputs are run by length, and answered in the order they were sent."""
    async with running() as run:
        texts = [" ".join(["w5"] * (1 + n % 7)) for n in range(150)]
        vectors = await run.embed(*texts)
        assert vectors.dtype == np.float32
        assert vectors.tolist() == [expected(ids(*text.split())) for text in texts]
        assert len(run.backend.batches) >= 3


async def test_one_thread_creates_uses_and_closes_the_backend() -> None:
    """The backend never meets a second thread."""
    async with running() as run:
        await asyncio.gather(*(run.embed(f"w{n}") for n in range(50)))
    assert run.backend.threads == {"model-fake"}
    assert run.backend.closed


async def test_lanes_run_batches_side_by_side() -> None:
    """A backend with two lanes is called by two threads at a time, and every caller gets its own vectors."""
    async with running(streams=2) as run:
        run.backend.gate.clear()
        tasks = [asyncio.create_task(run.embed(*(f"w{n} w{m}" for m in range(30)))) for n in range(30)]
        async with asyncio.timeout(60):
            while run.backend.inside < 2:
                await asyncio.sleep(0.001)
        run.backend.gate.set()
        answers = await asyncio.gather(*tasks)
        for n, vectors in enumerate(answers):
            assert vectors.tolist() == [expected(ids(f"w{n}", f"w{m}")) for m in range(30)]
    assert run.backend.threads == {"model-fake", "model-fake-1"}
    assert run.backend.closed


async def test_requests_that_come_while_a_batch_runs_form_the_next() -> None:
    """While the model is busy the next batch gathers, across requests."""
    async with running() as run:
        holding = await run.hold()
        others = [asyncio.create_task(run.embed(f"w{n}")) for n in range(10)]
        await run.until_waiting(10)
        run.backend.gate.set()
        await asyncio.gather(holding, *others)
        assert [len(batch) for batch in run.backend.batches] == [1, 10]


async def test_a_large_request_does_not_hold_up_a_small_one() -> None:
    """A single text is answered long before a request of 2048 that came first."""
    async with running() as run:
        holding = await run.hold()
        large = asyncio.create_task(run.embed(*(["w2 w3"] * 2048)))
        await run.until_waiting(2048)
        small = asyncio.create_task(run.embed("w4 w4"))
        await run.until_waiting(2049)
        run.backend.gate.set()
        await asyncio.gather(holding, small, large)
        first = next(i for i, batch in enumerate(run.backend.batches) if ids("w4", "w4") in batch)
        assert first <= 2
        assert len(run.backend.batches) > 30


async def test_an_input_that_fails_fails_only_its_own_request() -> None:
    """The batch is halved until the input at fault stands alone; the neighbours get their vectors."""
    async with running() as run:
        holding = await run.hold()
        good = [asyncio.create_task(run.embed(f"w{n} w{n}")) for n in range(20)]
        bad = asyncio.create_task(run.embed("w7 w7", FAILS, "w8 w8"))
        await run.until_waiting(23)
        run.backend.gate.set()
        await holding
        with pytest.raises(InferenceError, match="RuntimeError"):
            await bad
        answers = await asyncio.gather(*good)
        assert [a[0].tolist() for a in answers] == [expected(ids(f"w{n}", f"w{n}")) for n in range(20)]
        assert any(record.failed for record in run.records)
        assert (await run.embed("w1")).tolist() == [expected(ids("w1"))]


async def test_a_cancelled_request_leaves_the_queue() -> None:
    """Work that nobody waits for is not done."""
    async with running() as run:
        holding = await run.hold()
        gone = asyncio.create_task(run.embed(*(["w9"] * 500)))
        await run.until_waiting(500)
        gone.cancel()
        await run.until_waiting(0)
        run.backend.gate.set()
        await holding
        with pytest.raises(asyncio.CancelledError):
            await gone
        await run.embed("w1")
        assert sum(map(len, run.backend.batches)) == 2


async def test_a_request_that_takes_too_long_is_dropped() -> None:
    """After REQUEST_TIMEOUT_S the caller hears of it and the rest of the work is not done."""
    async with running(limits=LimitSettings(request_timeout_s=1.0)) as run:
        holding = await run.hold()
        with pytest.raises(DeadlineExceededError, match="1 seconds"):
            await run.embed(*(["w9"] * 500))
        assert run.engine.waiting_inputs == 0
        run.backend.gate.set()
        with pytest.raises(DeadlineExceededError):
            await holding


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    """Over MAX_QUEUE_TOKENS a request is refused at once; an empty queue takes any request."""
    async with running(batching=BatchSettings(max_queue_tokens=50)) as run:
        assert len(await run.embed(*(["w1"] * 100))) == 100
        holding = await run.hold()
        waiting = [asyncio.create_task(run.embed(*(["w2"] * inputs))) for inputs in (15, 14)]
        await run.until_waiting(29)
        with pytest.raises(QueueFullError, match="87 tokens") as caught:
            await run.embed(*(["w3"] * 3))
        assert caught.value.retry_after_s > 0
        run.backend.gate.set()
        await asyncio.gather(holding, *waiting)


async def test_a_request_larger_than_the_queue_keeps_no_small_one_out() -> None:
    """It is passed by them anyway; a second such request is refused until it is through."""
    async with running(batching=BatchSettings(max_queue_tokens=50)) as run:
        holding = await run.hold()
        large = asyncio.create_task(run.embed(*(["w2"] * 100)))
        await run.until_waiting(100)
        small = asyncio.create_task(run.embed("w3", "w4"))
        await run.until_waiting(102)
        with pytest.raises(QueueFullError, match="306 tokens"):
            await run.embed(*(["w5"] * 100))
        run.backend.gate.set()
        await asyncio.gather(holding, large, small)


async def test_stopping_finishes_what_was_accepted_and_takes_no_more() -> None:
    """`stop` answers the queue, then closes the backend."""
    async with running(batching=BatchSettings(min_batch_size=64, max_wait_time_ms=30_000)) as run:
        accepted = asyncio.create_task(run.embed(*(["w1"] * 20)))
        await run.until_waiting(20)
        await asyncio.to_thread(run.engine.stop)
        assert len(await accepted) == 20
        assert run.backend.closed
        with pytest.raises(ModelNotReadyError, match="stopped"):
            await run.embed("w1")


async def test_a_few_inputs_wait_for_more_up_to_the_limit() -> None:
    """MIN_BATCH_SIZE holds a lone input back, MAX_WAIT_TIME_MS lets it go."""
    async with running(batching=BatchSettings(min_batch_size=8, max_wait_time_ms=200)) as run:
        set_results = await run.engine.embed(["w1"], PLAIN)
        assert set_results.timing.queue_s >= 0.2
    async with running(batching=BatchSettings(min_batch_size=8, max_wait_time_ms=60_000)) as run:
        answers = await asyncio.gather(*(run.engine.embed(["w1"], PLAIN) for _ in range(8)))
        assert max(a.timing.queue_s for a in answers) < 60
        assert [len(batch) for batch in run.backend.batches] == [8]


async def test_a_model_that_cannot_be_loaded_says_why() -> None:
    """What the load raises reaches whoever asked for the model."""

    def load() -> FakeBackend:
        raise LoadError("no such weights")

    with ThreadPoolExecutor(1) as executor, pytest.raises(LoadError, match="no such weights"):
        await Engine.start(
            ModelSpec(alias="fake", name="fake"), load, batching=BatchSettings(), limits=LimitSettings(),
            executor=executor, on_batch=lambda _: None,
        )  # fmt: skip


async def test_a_model_whose_first_vector_is_not_finite_is_not_served() -> None:
    """A model that loads but gives NaN is a failed load, and its backend is closed."""
    made: list[FakeBackend] = []

    class Broken(FakeBackend):
        def embed(self, batch: object) -> np.ndarray:
            return np.full((1, 4), np.nan, dtype=np.float32)

    def load() -> FakeBackend:
        made.append(Broken())
        return made[0]

    with ThreadPoolExecutor(1) as executor, pytest.raises(LoadError, match="is not finite: its weights"):
        await Engine.start(
            ModelSpec(alias="fake", name="fake"), load, batching=BatchSettings(), limits=LimitSettings(),
            executor=executor, on_batch=lambda _: None,
        )  # fmt: skip
    assert made[0].closed


# --- what a request may say ---------------------------------------------------------------------------


async def test_vectors_have_length_one_where_the_model_or_the_request_says() -> None:
    """`normalize` wins over the model's own way."""
    async with running(describe(normalize=True)) as run:
        assert np.linalg.norm(await run.embed("w1 w2")) == pytest.approx(1)
        assert (await run.embed("w1 w2", normalize=False)).tolist() == [expected(ids("w1", "w2"))]
    async with running() as run:
        assert np.linalg.norm(await run.embed("w1 w2", normalize=True)) == pytest.approx(1)


async def test_a_cut_vector_has_length_one_again() -> None:
    """Declared and granted sizes are cut and renormalized; the native size is always accepted."""
    async with running(describe(matryoshka=(2,)), dimensions=(3,)) as run:
        whole = np.array(expected(ids("w1", "w2")), dtype=np.float32)
        for size in (2, 3):
            vector = (await run.embed("w1 w2", dimensions=size))[0]
            np.testing.assert_allclose(vector, whole[:size] / np.linalg.norm(whole[:size]), rtol=1e-6)
        assert (await run.embed("w1 w2", dimensions=4)).tolist() == [whole.tolist()]
        for size in (1, 5):
            with pytest.raises(DimensionsError, match=r"allowed: 2, 3, 4"):
                await run.embed("w1", dimensions=size)


async def test_any_smaller_size_may_be_granted() -> None:
    """`dimensions: any` allows every size up to the native one."""
    async with running(dimensions="any") as run:
        assert (await run.embed("w1", dimensions=1)).shape == (1, 1)
        with pytest.raises(DimensionsError, match="1 to 4"):
            await run.embed("w1", dimensions=5)


async def test_a_prompt_is_put_before_each_input() -> None:
    """`input_type` names a prompt of the model, by its own name or a usual one."""
    prompts = {"query": "w90 ", "passage": "w91 "}
    async with running(describe(prompts=prompts, default_prompt="passage")) as run:
        assert (await run.embed("w1", input_type="search_query")).tolist() == [expected(ids("w90", "w1"))]
        for name in ("document", "passage", "retrieval.passage"):
            assert (await run.embed("w1", input_type=name)).tolist() == [expected(ids("w91", "w1"))]
        assert (await run.embed("w1")).tolist() == [expected(ids("w91", "w1"))]
        with pytest.raises(RequestError, match=r"'query', 'passage'") as caught:
            await run.embed("w1", input_type="clustering")
        assert caught.value.param == "input_type"


async def test_a_known_input_type_without_a_prompt_changes_nothing() -> None:
    """A model without prompts takes the usual names."""
    async with running() as run:
        assert (await run.embed("w1", input_type="query")).tolist() == [expected(ids("w1"))]


async def test_inputs_that_are_too_long_are_cut_or_refused() -> None:
    """`truncate` says where to cut; NONE refuses; the answer tells how many were cut."""
    words = [f"w{n}" for n in range(20)]
    async with running() as run:
        end = await run.engine.embed(["w1", " ".join(words)], PLAIN)
        assert (end.truncated, end.tokens) == (1, 3 + 16)
        assert end.vectors[1].tolist() == expected(ids(*words[:14]))
        start = await run.embed(" ".join(words), truncate="START")
        assert start.tolist() == [expected(ids(*words[6:]))]
        with pytest.raises(InputTooLongError, match=r"'input\[1\]': maximum input length is 16 tokens"):
            await run.embed("w1", " ".join(words), truncate="NONE")


async def test_a_request_may_name_a_shorter_limit() -> None:
    """`truncate_prompt_tokens` is 1 to the model's maximum, or -1 for that."""
    async with running(truncate="NONE") as run:
        assert (await run.embed("w1 w2 w3", truncate_prompt_tokens=4)).tolist() == [expected(ids("w1", "w2"))]
        assert len(await run.embed("w1 w2 w3", truncate_prompt_tokens=-1)) == 1
        for wrong in (0, 17, -2):
            with pytest.raises(RequestError, match=r"-1, 1 to 16") as caught:
                await run.embed("w1", truncate_prompt_tokens=wrong)
            assert caught.value.param == "truncate_prompt_tokens"


async def test_all_inputs_together_are_limited() -> None:
    """A request over MAX_REQUEST_TOKENS is refused before any of it runs."""
    async with running(limits=LimitSettings(max_request_tokens=10)) as run:
        with pytest.raises(TooManyTokensError, match=r"Requested 12 tokens, max 10 tokens per request"):
            await run.embed("w1", "w2", "w3", "w4")
        assert run.backend.batches == []


async def test_token_ids_are_refused_unless_the_model_is_set_up_for_them() -> None:
    """Guessing whose ids they are would give plausible garbage: the error names both ways out."""
    async with running() as run:
        with pytest.raises(TokenInputError, match=r"check_embedding_ctx_length=False.*token_input"):
            await run.engine.embed([[5, 6]], PLAIN)


async def test_the_models_own_token_ids_are_taken_verbatim() -> None:
    """`token_input: model` adds nothing, and checks the range."""
    async with running(token_input="model") as run:
        set_results = await run.engine.embed([[5, 6, 7], [8]], PLAIN)
        assert set_results.vectors.tolist() == [expected([5, 6, 7]), expected([8])]
        with pytest.raises(TokenInputError, match=r"input\[1\]") as caught:
            await run.engine.embed([[5], [104]], PLAIN)
        assert caught.value.code == "invalid_value"


def test_the_batch_budget_follows_the_device_unless_it_is_set() -> None:
    """A GPU gets larger batches; what the operator says wins."""
    assert (
        batch_policy(BatchSettings(), "cuda:0").max_batch_tokens
        > batch_policy(BatchSettings(), "cpu").max_batch_tokens
    )
    assert batch_policy(BatchSettings(max_batch_tokens=77), "cuda:0").max_batch_tokens == 77
