"""The soak test recognizes wrong responses, and failures that no outage explains."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import numpy as np
import pytest

from benchmarks.soak_client import Response
from benchmarks.soak_requests import Request, RequestFactory, find_error, make_pool
from benchmarks.soak_sender import Outages

MODEL = "model"


@pytest.mark.parametrize(("rows", "error"), [((0, 1), ""), ((1, 0), "wrong vector"), ((0,), "vectors of shape")])
def test_vectors_of_a_response_are_compared(rows: tuple[int, ...], error: str) -> None:
    """Vectors in the wrong order, and missing vectors, are errors."""
    pool = make_pool(8, seed=1)
    pool.vectors[MODEL] = np.eye(len(pool.texts), dtype=np.float32)
    vectors = [pool.vectors[MODEL][row].tolist() for row in rows]
    response = _response({"data": [{"index": index, "embedding": vector} for index, vector in enumerate(vectors)]})
    found = find_error(Request("short", model=MODEL, rows=(0, 1)), response, pool)
    assert found.startswith(error)
    assert bool(found) == bool(error)


def test_error_codes_are_compared() -> None:
    """Another code than the expected one, and a body that is not an error of the API, are errors."""
    pool = make_pool(8, seed=1)
    request = Request("bad JSON", status=400, code="invalid_json")
    assert find_error(request, _response({"error": {"code": "invalid_json"}}, 400), pool) == ""
    assert "instead of invalid_json" in find_error(request, _response({"error": {"code": "x"}}, 400), pool)
    assert find_error(request, _response({"detail": "x"}, 400), pool).startswith("malformed response")


def test_requests_are_the_same_in_each_run() -> None:
    """A seed determines the requests."""

    def draw() -> list[Request]:
        requests = RequestFactory(make_pool(8, seed=1), [MODEL], random.Random(2))  # noqa: S311 - not a secret
        return [requests.draw({"short": 1.0, "bad JSON": 1.0, "/health": 1.0}) for _ in range(20)]

    assert draw() == draw()
    assert len({request.kind for request in draw()}) == 3


def test_outages_explain_failures_of_their_model() -> None:
    """A reload explains 503 of one model; the replacement of the process explains every failure."""
    outages = Outages()
    now = time.monotonic()
    outages.begin(MODEL)
    assert outages.explain("503", MODEL, now)
    assert not outages.explain("503", "other", now)
    assert not outages.explain("broken connection", MODEL, now)
    replacement = outages.begin("")
    assert outages.explain("broken connection", "other", now)
    replacement.end = now
    assert not outages.explain("broken connection", "other", now + 60)


def _response(content: dict[str, Any], status: int = 200) -> Response:
    return Response(status, {}, json.dumps(content).encode())
