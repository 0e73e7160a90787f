"""A body with more JSON values than a valid request is refused before it is parsed."""

from __future__ import annotations

import gzip
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from benchmarks.hostile import hostile_bodies
from emb_model_provider.api.limits import JsonValueCounter, max_json_values
from emb_model_provider.errors import BodyTooLargeError, RequestError
from emb_model_provider.formatting import quote
from emb_model_provider.settings import LimitSettings

if TYPE_CHECKING:
    from tests.service import Service

MIB = 2**20
LIMIT = 50
LARGE = 20 * MIB


def count(value: Any) -> int:
    """Return the number of values and keys in a JSON value, except the first one."""
    if isinstance(value, dict):
        return sum(2 + count(item) for item in value.values())
    return sum(1 + count(item) for item in value) if isinstance(value, list) else 0


def is_refused(body: bytes, limit: int, *, piece: int) -> bool:
    counter = JsonValueCounter(limit)
    try:
        for start in range(0, len(body), piece):
            counter.add(body[start : start + piece])
    except BodyTooLargeError:
        return True
    return False


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kinds = ["number", "text"] if depth > 3 else ["number", "text", "list", "dict"]
    match rng.choice(kinds):
        case "number":
            return rng.randrange(1000)
        case "text":
            return "".join(rng.choices('ab\\",:[{é🚀', k=rng.randrange(30)))
        case "list":
            return [random_value(rng, depth + 1) for _ in range(rng.randrange(8))]
    return {str(n) + '",': random_value(rng, depth + 1) for n in range(rng.randrange(8))}


def test_only_values_outside_of_texts_count() -> None:
    """Quotes, backslashes and commas in texts do not, however the body is divided into pieces."""
    rng = random.Random(5)  # noqa: S311 - not for cryptography
    for _ in range(40):
        value = [random_value(rng) for _ in range(12)]
        for encoded in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
            body = encoded.encode() + b" " * 400  # shorter bodies are not counted
            # An empty array or object counts as one more.
            least, most = count(value), count(value) + 1 + encoded.count("[]") + encoded.count("{}")
            for piece in (1, 7, 10_000):
                if least > 400:
                    continue
                assert not is_refused(body, max(most, 1), piece=piece)
                if least > 1:
                    assert is_refused(body, least - 1, piece=piece)


def test_values_of_another_charset_are_not_counted_but_refused() -> None:
    """Bytes of UTF-16 can look like quotes."""
    with pytest.raises(RequestError, match="UTF-8"):
        JsonValueCounter(LIMIT).add(json.dumps({"input": ["∢"] * LIMIT}).encode("utf-16"))


def test_largest_valid_requests_have_fewer_values() -> None:
    """Token ids in as many rows as there can be inputs, and the inputs of Cohere's API, of which each has 8 values."""
    limits = LimitSettings()
    row = [1] * (limits.max_request_tokens // limits.max_inputs)
    content = [{"content": [{"type": "text", "text": "a, b"}]}] * limits.max_inputs
    for fields in ({"input": [row] * limits.max_inputs}, {"inputs": content}, {"input": "[,{" * 10**6}):
        assert not is_refused(json.dumps(fields).encode(), max_json_values(limits), piece=65536)


@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        ("a" * 10**6, repr("a" * 100) + "… (1000000 characters)"),
        ("short", "'short'"),
        ([[]] * 10**6, "an array of 1000000 items"),
        ({"a": [1]}, "an object with 1 keys"),
        (1.5, "1.5"),
        (None, "None"),
    ],
)
def test_values_are_quoted_by_type_and_length(value: Any, quoted: str) -> None:
    assert quote(value) == quoted


BODIES = hostile_bodies(LARGE)
PATHS = ("/v1/embeddings", "/embed", "/v2/embed", "/api/embed", "/tokenize", "/openai/deployments/m/embeddings")


@pytest.mark.slow
def test_memory_and_health_while_many_values_are_sent(service: Service) -> None:
    """Eight clients at once, on the routes of all APIs, compressed or not. Bodies for management are small."""
    process = psutil.Process(service.process.pid)
    before, highest = process.memory_info().rss, 0

    def send(job: tuple[str, str, bool]) -> int:
        path, name, compressed = job
        headers = {"content-type": "application/json"} | ({"content-encoding": "gzip"} if compressed else {})
        body = gzip.compress(BODIES[name], 1) if compressed else BODIES[name]
        return service.http.post(path, content=body, headers=headers).status_code

    jobs = [(PATHS[0], name, compressed) for name in BODIES for compressed in (False, True)]
    jobs += [(path, "arrays", False) for path in PATHS[1:]]
    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(send, job) for job in jobs]
        while not all(answer.done() for answer in answers):
            assert service.http.get("/health").status_code == 200
            highest = max(highest, process.memory_info().rss)
            time.sleep(0.02)
    statuses = {job[:2]: answer.result() for job, answer in zip(jobs, answers, strict=True)}
    assert set(statuses.values()) <= {400, 413, 429}, statuses
    # The bodies themselves, which MAX_PENDING_BODY_MB bounds, and each again while it is joined. Parsing the arrays
    # would take 30 times their size.
    assert highest - before < 3 * 8 * LARGE
    assert service.http.post("/api/models/load?model_name=x", content=b"x" * 2 * MIB).status_code == 413
