"""OpenAI's official client."""

from __future__ import annotations

import base64
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest

from tests.api.helpers import KEYS, MANY_TEXTS, POISON, busy
from tests.service import BUNDLED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.service import Service


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    """Yield a client of the default service, which requires no key."""
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_default_call(client: openai.OpenAI, service: Service) -> None:
    """The client's default, which requests base64 and decodes it, returns the vectors of the float format."""
    answer = client.embeddings.create(model=BUNDLED, input=["hello", "world", "hello"])
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert answer.model == BUNDLED
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 9
    plain = service.embed(["hello", "world", "hello"]).json()["data"]
    returned = np.array([entry.embedding for entry in answer.data], dtype=np.float32)
    np.testing.assert_array_equal(returned, np.array([entry["embedding"] for entry in plain], dtype=np.float32))


def test_float_format(client: openai.OpenAI) -> None:
    """One text in the float format returns a list of numbers."""
    answer = client.embeddings.create(model=BUNDLED, input="hello", encoding_format="float")
    assert len(answer.data) == 1
    assert len(answer.data[0].embedding) == 384
    assert isinstance(answer.data[0].embedding[0], float)


def test_base64_format(client: openai.OpenAI) -> None:
    """If the caller requests base64, the client returns the text."""
    answer = client.embeddings.create(model=BUNDLED, input="hello", encoding_format="base64")
    text: Any = answer.data[0].embedding
    assert len(base64.b64decode(text, validate=True)) == 384 * 4


async def test_async_client(service: Service) -> None:
    """The asynchronous client returns the same."""
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="unused") as client:
        answer = await client.embeddings.create(model=BUNDLED, input=["hello", "world"])
        assert [len(entry.embedding) for entry in answer.data] == [384, 384]
        assert [model.id async for model in client.models.list()] == [BUNDLED]


def test_models_with_a_slash(client: openai.OpenAI) -> None:
    """The client sends the slash of an id as %2F, and gets the model."""
    assert [model.id for model in client.models.list()] == [BUNDLED]
    model = client.models.retrieve(BUNDLED)
    assert (model.id, model.object, model.owned_by) == (BUNDLED, "model", "sentence-transformers")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no/such")


def test_request_id(client: openai.OpenAI) -> None:
    """`with_raw_response` and the parsed object have the request id."""
    raw = client.embeddings.with_raw_response.create(model=BUNDLED, input="hello")
    assert raw.headers["x-request-id"].startswith("req_")
    assert raw.parse()._request_id == raw.headers["x-request-id"]


def test_errors(client: openai.OpenAI) -> None:
    """The client raises the class that its users catch, with `code` and `param`."""
    with pytest.raises(openai.NotFoundError) as unknown:
        client.embeddings.create(model="nope", input="x")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert unknown.value.request_id is not None
    with pytest.raises(openai.BadRequestError) as wrong_size:
        client.embeddings.create(model=BUNDLED, input="x", dimensions=7)
    assert (wrong_size.value.code, wrong_size.value.param) == ("invalid_dimensions", "dimensions")
    assert wrong_size.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as empty:
        client.embeddings.create(model=BUNDLED, input=[])
    assert (empty.value.code, empty.value.param) == ("invalid_input", "input")


def test_keys(guarded: Service) -> None:
    """A valid key is accepted, and another is an AuthenticationError."""
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEYS[0]) as good:
        assert len(good.embeddings.create(model="mini", input="x").data) == 1
    with (
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="sk-wrong") as wrong,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        wrong.embeddings.create(model="mini", input="x")
    assert refused.value.code == "invalid_api_key"


def test_dimensions(guarded: Service) -> None:
    """`dimensions` truncates and normalizes the vector."""
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEYS[0]) as client:
        vector = client.embeddings.create(model="mini", input="x", dimensions=32).data[0].embedding
    assert len(vector) == 32
    np.testing.assert_allclose(np.linalg.norm(vector), 1, atol=1e-6)


def test_full_queue_is_retried(strained: Service) -> None:
    """A 429 is a RateLimitError without retries; the client's own retries wait and succeed."""
    url, before = f"{strained.url}/v1", strained.figure("emb_provider_requests_total", status="429")
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as hasty, busy(strained, 100):
        with pytest.raises(openai.RateLimitError) as full:
            hasty.embeddings.create(model="mini", input=MANY_TEXTS[:3])
        assert (full.value.code, full.value.type) == ("queue_full", "rate_limit_error")
        assert 1 <= int(full.value.response.headers["retry-after"]) <= 120
        with openai.OpenAI(base_url=url, api_key="unused", max_retries=5) as patient:
            raw = patient.embeddings.with_raw_response.create(model="mini", input=MANY_TEXTS[:3])
    assert raw.retries_taken >= 1
    assert strained.figure("emb_provider_requests_total", status="429") == before + 1 + raw.retries_taken


def test_server_errors_are_retried(strained: Service) -> None:
    """500 and 503 are InternalServerErrors, and the client retries each twice."""
    for fields, status in (({"model": "broken", "input": "x"}, 503), ({"model": "poisoned", "input": POISON}, 500)):
        counted = {"model": fields["model"], "status": str(status)}
        before = strained.figure("emb_provider_requests_total", **counted)
        # No retries of 503, because the client waits for Retry-After, which is half a minute for a failed model.
        client = openai.OpenAI(base_url=f"{strained.url}/v1", api_key="unused", max_retries=0 if status == 503 else 2)
        with client, pytest.raises(openai.InternalServerError) as failed:
            client.embeddings.create(**fields)  # type: ignore[arg-type]
        assert failed.value.status_code == status
        tries = 1 if status == 503 else 3
        assert strained.figure("emb_provider_requests_total", **counted) == before + tries


def test_threads_share_a_client(client: openai.OpenAI) -> None:
    """Each thread gets the vector of its own text."""
    expected = {str(n): client.embeddings.create(model=BUNDLED, input=f"text {n}").data[0].embedding for n in range(8)}
    returned: dict[str, list[float]] = {}

    def ask(name: str) -> None:
        returned[name] = client.embeddings.create(model=BUNDLED, input=f"text {name}").data[0].embedding

    threads = [threading.Thread(target=ask, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, vector in expected.items():
        np.testing.assert_allclose(returned[name], vector, atol=1e-5)
