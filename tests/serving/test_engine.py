"""An engine with a fake backend: order, truncation, token ids, limits and deadlines of requests."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from emb_model_provider.errors import (
    DeadlineExceededError,
    InputTooLongError,
    RequestError,
    TokenInputError,
    TooManyTokensError,
)
from emb_model_provider.serving.engine import EmbedOptions
from emb_model_provider.settings import BatchSettings, LimitSettings
from tests.serving.fakes import describe, expected
from tests.serving.helpers import different, ids, started_engine

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.serving.jobs import BatchRecord

pytestmark = pytest.mark.usefixtures("short_collections")

DEFAULTS = EmbedOptions()


async def test_vectors_have_the_order_of_the_inputs() -> None:
    """Inputs run sorted by length, and are returned in the order of the request."""
    async with started_engine() as run:
        texts = [" ".join([word] * (1 + n % 7)) for n, word in enumerate(different(150))]
        vectors = await run.embed(*texts)
        assert vectors.dtype == np.float32
        assert vectors.tolist() == [expected(ids(*text.split())) for text in texts]
        assert len(run.backend.batches) >= 3


async def test_deadline_removes_the_request() -> None:
    """After REQUEST_TIMEOUT_S the request fails, and its waiting inputs do not run."""
    async with started_engine(config={"limits": LimitSettings(request_timeout_s=1.0)}) as run:
        holding = await run.hold()
        with pytest.raises(DeadlineExceededError, match="no progress within 1 seconds"):
            await run.embed(*different(500))
        assert run.engine.waiting_inputs == 0
        run.backend.gate.set()
        with pytest.raises(DeadlineExceededError):
            await holding


def slow_batches(seconds: float) -> Callable[[BatchRecord], None]:
    """Return a recorder of batches that takes this long, so that the model is slow."""
    return lambda _record: time.sleep(seconds)


async def test_requests_wait_while_the_model_makes_progress() -> None:
    """Much longer than REQUEST_TIMEOUT_S: many small ones, and one of many batches."""
    config = {"limits": LimitSettings(request_timeout_s=0.5), "batching": BatchSettings(max_batch_size=4)}
    async with started_engine(config=config, on_batch=slow_batches(0.1)) as run:
        large = asyncio.create_task(run.embed(*different(60)))
        small = [asyncio.create_task(run.embed("w1")) for _ in range(40)]
        assert (await large).shape == (60, 4)
        assert len(await asyncio.gather(*small)) == 40


async def test_total_time_of_a_request_is_limited() -> None:
    """By REQUEST_TOTAL_TIMEOUT_S, whatever progress the model makes. Its waiting inputs do not run."""
    limits = LimitSettings(request_total_timeout_s=0.5)
    async with started_engine(config={"limits": limits}, on_batch=slow_batches(0.1)) as run:
        with pytest.raises(DeadlineExceededError, match=r"0\.5 seconds"):
            await run.embed(*different(3000))
        assert run.engine.waiting_inputs == 0


async def test_long_inputs_are_truncated_or_rejected() -> None:
    """`truncate` chooses the side, NONE rejects, and the result counts the truncated inputs."""
    words = [f"w{n}" for n in range(20)]
    async with started_engine() as run:
        end = await run.engine.embed(["w1", " ".join(words)], DEFAULTS)
        assert (end.truncated, end.tokens) == (1, 3 + 16)
        assert end.vectors[1].tolist() == expected(ids(*words[:14]))
        start = await run.embed(" ".join(words), truncate="START")
        assert start.tolist() == [expected(ids(*words[6:]))]
        with pytest.raises(InputTooLongError, match=r"'input\[1\]': maximum input length is 16 tokens"):
            await run.embed("w1", " ".join(words), truncate="NONE")


async def test_inputs_take_the_route_of_their_task() -> None:
    """Each with the prompts, the length and the normalization of its route."""
    query = describe(prompts={"query": "w1 "}, max_length=6, normalize=True)
    model = describe(routes={"query": query, "document": describe()}, default_route="document", prompts=query.prompts)
    async with started_engine(model) as run:
        run.backend.tasks.clear()
        vectors = await run.embed("w2", input_type="query")
        assert vectors[0] == pytest.approx(
            np.array(expected(ids("w1", "w2"))) / np.linalg.norm(expected(ids("w1", "w2")))
        )
        assert (await run.embed("w2")).tolist() == [expected(ids("w2"))]
        with pytest.raises(InputTooLongError, match="6 tokens"):
            await run.embed("w2 " * 6, input_type="query", truncate="NONE")
        assert run.backend.tasks == ["query", "document"]


async def test_request_can_lower_the_token_limit() -> None:
    """`truncate_prompt_tokens` is 1 to the maximum of the model, or -1 for the maximum."""
    async with started_engine(truncate="NONE") as run:
        assert (await run.embed("w1 w2 w3", truncate_prompt_tokens=4)).tolist() == [expected(ids("w1", "w2"))]
        assert len(await run.embed("w1 w2 w3", truncate_prompt_tokens=-1)) == 1
        for wrong in (0, 17, -2):
            with pytest.raises(RequestError, match=r"-1, 1 to 16") as caught:
                await run.embed("w1", truncate_prompt_tokens=wrong)
            assert caught.value.param == "truncate_prompt_tokens"


async def test_tokens_of_a_request_are_limited() -> None:
    """A request with more than MAX_REQUEST_TOKENS is rejected before any input runs."""
    async with started_engine(config={"limits": LimitSettings(max_request_tokens=10)}) as run:
        with pytest.raises(TooManyTokensError, match=r"Requested 12 tokens, max 10 tokens per request"):
            await run.embed("w1", "w2", "w3", "w4")
        assert run.backend.batches == []


async def test_token_ids_are_rejected_by_default() -> None:
    """Ids of another tokenizer would return wrong vectors, so the error names both solutions."""
    async with started_engine() as run:
        with pytest.raises(TokenInputError, match=r"check_embedding_ctx_length=False.*token_input"):
            await run.engine.embed([[5, 6]], DEFAULTS)


async def test_token_ids_of_the_model_are_used_unchanged() -> None:
    """`token_input: model` adds no special tokens, and checks the range of the ids."""
    async with started_engine(token_input="model") as run:
        embeddings = await run.engine.embed([[5, 6, 7], [8]], DEFAULTS)
        assert embeddings.vectors.tolist() == [expected([5, 6, 7]), expected([8])]
        with pytest.raises(TokenInputError, match=r"input\[1\]") as caught:
            await run.engine.embed([[5], [100_000]], DEFAULTS)
        assert caught.value.code == "invalid_value"
