"""An engine with a fake backend: order, truncation, token ids, limits and deadlines of requests."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tokenizers import processors

from emb_model_provider.errors import (
    BodyTooLargeError,
    DeadlineExceededError,
    InputTooLongError,
    RequestError,
    TextTooLongError,
    TokenInputError,
    TooManyTokensError,
)
from emb_model_provider.serving.engine import EmbedOptions
from emb_model_provider.serving.jobs import in_background
from emb_model_provider.settings import BatchSettings, LimitSettings
from tests.serving.fakes import describe, expected, word_tokenizer
from tests.serving.helpers import different, ids, started_engine, until

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
        with pytest.raises(DeadlineExceededError, match="no progress within 1 seconds") as waited:
            await run.embed(*different(500))
        assert waited.value.can_repeat
        assert "Send it again later" in waited.value.message
        assert run.engine.waiting_inputs == 0
        run.backend.gate.set()
        with pytest.raises(
            DeadlineExceededError, match=r"fewer or shorter texts.*EMB_PROVIDER_REQUEST_TIMEOUT_S"
        ) as ran:
            await holding
        assert not ran.value.can_repeat


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
        with pytest.raises(DeadlineExceededError, match=r"0\.5 seconds.*fewer.*_TOTAL_") as caught:
            await run.embed(*different(3000))
        assert not caught.value.can_repeat
        assert run.engine.waiting_inputs == 0


async def test_background_requests_wait_for_others_and_have_no_limit_of_time() -> None:
    """A request waits for the batch that runs, and no longer. What is left of the background request runs after it."""
    limits = LimitSettings(request_total_timeout_s=0.5)
    config = {"limits": limits, "batching": BatchSettings(max_batch_size=4)}
    async with started_engine(config=config, on_batch=slow_batches(0.1)) as run:
        with in_background():
            large = asyncio.create_task(run.embed(*different(40)))
        await until(lambda: len(run.backend.batches) == 2)
        await run.embed("w1")
        place = run.backend.batches.index([ids("w1")])
        assert place <= 4
        assert (await large).tolist() == [expected(ids(text)) for text in different(40)]
        assert len(run.backend.batches) == 11


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


async def test_requests_take_turns_at_tokenizing_and_stop_when_they_are_cancelled() -> None:
    """A request of many long texts does not delay others, and nothing is tokenized that no request waits for."""
    async with started_engine() as run:
        large = asyncio.create_task(run.embed(*["w1 " * 20_000] * 500))
        await until(lambda: run.executor.calls > 1)
        assert len(await run.embed("w1 " * 1000)) == 1
        assert not large.done()
        large.cancel()
        with pytest.raises(asyncio.CancelledError):
            await large
        calls = run.executor.calls
        assert calls < 400
        assert len(await run.embed("w2 " * 1000)) == 1
        assert run.executor.calls == calls + 1


async def test_error_of_a_long_text_names_its_input() -> None:
    """Although texts are tokenized some at a time."""
    long = "w1 " * 20_000
    async with started_engine() as run:
        with pytest.raises(InputTooLongError, match=r"'input\[3\]'"):
            await run.embed("w1", " " * 70_000, "w1", long, long, truncate="NONE")
        with pytest.raises(TextTooLongError, match=r"'input\[2\]': the text has 3000000 characters"):
            await run.embed(long, long, "\U0001f600" * 3_000_000)


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


@pytest.mark.parametrize(
    ("token_input", "rows", "reason"),
    [
        ("reject", [[5, 6]], "does not accept token ids"),
        ("auto", [[2, 5, 3], [2, 3]], "begin and end with the special tokens"),
        ("auto", [[5], [100_277]], r"input\[1\].*100277 is out of the range"),
        ("cl100k", [[15339, 222, 15339]], r"input\[0\].*not valid UTF-8"),
    ],
)
async def test_token_ids_that_are_not_accepted(token_input: str, rows: list[list[int]], reason: str) -> None:
    """Their vectors would be wrong. The error names the solutions: text, and the setting."""
    async with started_engine(token_input=token_input) as run:
        with pytest.raises(TokenInputError, match=f"{reason}.*check_embedding_ctx_length=False.*token_input"):
            await run.engine.embed(rows, DEFAULTS)


@pytest.mark.parametrize(
    ("token_input", "rows"), [("auto", [[86, 16]]), ("auto", [[2, 5, 3], [86, 16]]), ("cl100k", [[2, 5, 3], [86, 16]])]
)
async def test_token_ids_of_openai_are_decoded(token_input: str, rows: list[list[int]]) -> None:
    """Also those that look like ids of the model, if not all rows do, or if the setting says so."""
    async with started_engine(token_input=token_input) as run:
        embeddings = await run.engine.embed(rows, DEFAULTS)
        assert embeddings.vectors[-1].tolist() == expected(ids("w1"))


async def test_number_of_token_ids_is_limited() -> None:
    """They count as the client sends them, because it cannot know how many tokens of the model they are."""
    async with started_engine(config={"limits": LimitSettings(max_request_tokens=10)}) as run:
        embeddings = await run.engine.embed([[86, 16]] * 5, DEFAULTS)
        assert embeddings.tokens == 15
        with pytest.raises(TooManyTokensError, match=r"Requested 12 tokens, max 10 tokens per request"):
            await run.engine.embed([[86, 16]] * 6, DEFAULTS)
        with pytest.raises(TooManyTokensError, match=r"Requested 24 tokens, max 20 tokens per request"):
            await run.engine.embed([[86]] * 8, DEFAULTS)


async def test_text_of_token_ids_is_limited() -> None:
    """By the limit of request bodies, over all rows together."""
    async with started_engine(config={"limits": LimitSettings(max_body_mb=0.001)}) as run:
        await run.engine.embed([[86] * 500] * 2, DEFAULTS)
        with pytest.raises(BodyTooLargeError):
            await run.engine.embed([[86] * 500] * 3, DEFAULTS)


@pytest.mark.parametrize("template", ["[CLS] $A", "$A [SEP]"])
async def test_special_tokens_at_one_end_are_no_sign(template: str) -> None:
    """A text may well begin with a character whose id is that of the first token of the model."""
    tokenizer = word_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    async with started_engine(describe(tokenizer_json=tokenizer.to_str())) as run:
        assert (await run.engine.embed([[2, 86, 16, 3]], DEFAULTS)).vectors.shape == (1, 4)


async def test_token_ids_of_the_model_are_used_unchanged() -> None:
    """`token_input: model` adds no special tokens, and checks the range of the ids."""
    async with started_engine(token_input="model") as run:
        embeddings = await run.engine.embed([[5, 6, 7], [8]], DEFAULTS)
        assert embeddings.vectors.tolist() == [expected([5, 6, 7]), expected([8])]
        with pytest.raises(TokenInputError, match=r"input\[1\]") as caught:
            await run.engine.embed([[5], [100_000]], DEFAULTS)
        assert caught.value.code == "invalid_value"
