"""`/v1/batches` without a server and without models. tests/clients has the SDKs with the real service."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from emb_model_provider.api.app import create_app
from emb_model_provider.api.batch_calculator import ApiCalculator
from emb_model_provider.settings import Settings
from tests.api.helpers import assert_equal_answers
from tests.service import assert_error, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.service import Service

KEY, OTHER_KEY = "key-of-search", "key-of-indexing"
TIMES = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at")


@pytest.fixture
async def http(tmp_path: Path, batch_database: Path) -> AsyncIterator[httpx.AsyncClient]:
    settings = Settings.from_values(cache_dir=tmp_path, batch_dir=batch_database, api_keys=f"{KEY},{OTHER_KEY}")
    app = create_app(settings, on_nothing_to_serve=lambda: None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        client.headers["authorization"] = f"Bearer {KEY}"
        yield client
    await app.state.services.batches.stop()


async def upload(http: httpx.AsyncClient, content: bytes = b"\n") -> str:
    response = await http.post("/v1/files", files={"file": content}, data={"purpose": "batch"})
    identifier: str = response.json()["id"]
    return identifier


async def create(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    values = {"endpoint": "/v1/embeddings", "completion_window": "24h", **fields}
    return await http.post("/v1/batches", json={name: value for name, value in values.items() if value is not None})


async def ended(http: httpx.AsyncClient, batch_id: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            batch: dict[str, Any] = (await http.get(f"/v1/batches/{batch_id}")).json()
            if batch["status"] not in ("validating", "cancelling"):
                return batch
            await asyncio.sleep(0.02)


async def test_fields_of_a_batch(http: httpx.AsyncClient) -> None:
    """All of OpenAI's are present, null until they are known. A file without requests makes it fail."""
    file_id = await upload(http)
    metadata = {f"key-{number}": "值" * 512 for number in range(16)}
    created = (await create(http, input_file_id=file_id, metadata=metadata)).json()
    at = created["created_at"]
    assert created == {
        "id": created["id"],
        "object": "batch",
        "endpoint": "/v1/embeddings",
        "model": None,
        "errors": None,
        "input_file_id": file_id,
        "completion_window": "24h",
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": at,
        "expires_at": at + 24 * 3600,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": {
            "input_tokens": 0,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 0,
        },
        "metadata": metadata,
        "pause_reason": None,
        **dict.fromkeys(TIMES),
    }
    batch = await ended(http, created["id"])
    assert (batch["status"], batch["failed_at"] >= at) == ("failed", True)
    assert batch["errors"] == {
        "object": "list",
        "data": [
            {"code": "empty_file", "line": None, "message": "The input file contains no requests.", "param": None}
        ],
    }
    assert (await http.get("/v1/batches")).json() == {
        "object": "list",
        "data": [batch],
        "first_id": batch["id"],
        "last_id": batch["id"],
        "has_more": False,
    }
    cancelled = await http.post(f"/v1/batches/{batch['id']}/cancel")
    assert_error(cancelled, 409, "state_conflict", param="id", phrase="Cannot cancel a batch with status 'failed'")


INVALID: dict[str, tuple[dict[str, Any], int, str, str, str]] = {
    "no file": ({}, 400, "missing_required_parameter", "input_file_id", "Missing"),
    "unknown file": ({"input_file_id": "file-x"}, 404, "file_not_found", "input_file_id", "file-x"),
    "type of file": ({"input_file_id": 5}, 400, "invalid_type", "input_file_id", "a string"),
    "endpoint": ({"endpoint": "/v1/chat/completions"}, 400, "invalid_value", "endpoint", "/v1/rerank"),
    "no window": ({"completion_window": None}, 400, "missing_required_parameter", "completion_window", "Missing"),
    "window": ({"completion_window": "1h"}, 400, "invalid_value", "completion_window", "24h"),
    "metadata": ({"metadata": ["a"]}, 400, "invalid_type", "metadata", "an object"),
    "pairs": ({"metadata": {str(n): "" for n in range(17)}}, 400, "invalid_value", "metadata", "at most 16"),
    "value": ({"metadata": {"a": 1}}, 400, "invalid_value", "metadata", "Keys are strings"),
    "long key": ({"metadata": {"k" * 65: ""}}, 400, "invalid_value", "metadata", "64 characters"),
    "anchor": ({"output_expires_after": {"seconds": 3600}}, 400, "invalid_value", "output_expires_after", "created_at"),
    "seconds": (
        {"output_expires_after": {"anchor": "created_at", "seconds": 60}},
        400, "invalid_value", "output_expires_after.seconds", "3600 to 2592000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID)
async def test_invalid_fields(http: httpx.AsyncClient, case: str) -> None:
    """The message names the field and what is allowed."""
    fields, status, code, param, phrase = INVALID[case]
    file_id = None if "file" in case else await upload(http)
    response = await create(http, **{"input_file_id": file_id, **fields})
    assert_error(response, status, code, param=param, phrase=phrase)
    assert (await http.get("/v1/batches")).json()["data"] == []


async def test_files_and_batches_of_another_key_do_not_exist(http: httpx.AsyncClient) -> None:
    file_id = await upload(http)
    batch_id = (await create(http, input_file_id=file_id)).json()["id"]
    http.headers["authorization"] = f"Bearer {OTHER_KEY}"
    assert_error(await create(http, input_file_id=file_id), 404, "file_not_found", param="input_file_id")
    for method, path in (("GET", ""), ("POST", "/cancel")):
        response = await http.request(method, f"/v1/batches/{batch_id}{path}")
        assert_error(response, 404, "batch_not_found", param="id", phrase=batch_id)
    assert (await http.get("/v1/batches")).json()["data"] == []
    assert_error(await http.get("/v1/batches", params={"after": batch_id}), 404, "batch_not_found", param="id")


async def test_too_many_batches(tmp_path: Path, batch_database: Path) -> None:
    """The error is that of OpenAI's rate limits, but its SDKs do not wait. Other keys have limits of their own."""
    settings = Settings.from_values(
        cache_dir=tmp_path, batch_dir=batch_database, api_keys=f"{KEY},{OTHER_KEY}", max_unfinished_batches=2
    )
    app = create_app(settings, on_nothing_to_serve=lambda: None)
    await app.state.services.batches.open()
    await app.state.services.batches.stop()  # without its worker, no batch ends
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        for key in (KEY, OTHER_KEY):
            http.headers["authorization"] = f"Bearer {key}"
            file_id = await upload(http)
            created = [await create(http, input_file_id=file_id) for _ in range(3)]
            assert [response.status_code for response in created] == [200, 200, 429]
    phrase = "You have 2 batches that have not ended, and the limit is 2"
    assert_error(created[-1], 429, "batch_limit_exceeded", phrase=phrase, type="rate_limit_error")
    assert (created[-1].headers["retry-after"], created[-1].headers["x-should-retry"]) == ("60", "false")
    await app.state.services.batches.stop()


async def test_pages_of_batches(http: httpx.AsyncClient) -> None:
    """The latest first. The limit is 1 to 100."""
    file_id = await upload(http)
    ids = [(await create(http, input_file_id=file_id)).json()["id"] for _ in range(3)]
    first = (await http.get("/v1/batches", params={"limit": 2})).json()
    assert ([batch["id"] for batch in first["data"]], first["has_more"]) == (ids[:0:-1], True)
    rest = (await http.get("/v1/batches", params={"limit": 2, "after": first["last_id"]})).json()
    assert ([batch["id"] for batch in rest["data"]], rest["has_more"]) == (ids[:1], False)
    for limit in ("0", "101", "x"):
        response = await http.get("/v1/batches", params={"limit": limit})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "limit")


async def test_each_invalid_line_is_reported(http: httpx.AsyncClient) -> None:
    """With its number, and with the parameter that an interactive request would be refused for."""
    lines: list[Any] = [
        {"custom_id": "1", "method": "POST", "url": "/v1/rerank", "body": {"query": "x", "documents": ["y"]}},
        {"custom_id": "2", "method": "POST", "url": "/v1/rerank", "body": {"query": "x", "documents": []}},
        {"custom_id": "3", "method": "POST", "url": "/v1/rerank", "body": {"model": "nope", "query": "x", "documents": ["y"]}},
        {"custom_id": "4", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}},
        {"custom_id": "5", "method": "POST", "url": "/v1/rerank", "body": {"query": "x", "texts": ["y"], "top_n": 0}},
    ]  # fmt: skip
    content = "".join(json.dumps(line) + "\n" for line in lines).encode() + b"{\n"
    response = await create(http, input_file_id=await upload(http, content), endpoint="/v1/rerank")
    batch = await ended(http, response.json()["id"])
    assert [(error["line"], error["code"], error["param"]) for error in batch["errors"]["data"]] == [
        (2, "invalid_input", "body.documents"),
        (3, "model_not_found", "body.model"),
        (4, "invalid_url", "url"),
        (5, "invalid_value", "body.top_n"),
        (6, "invalid_json_line", None),
    ]
    for error, line in zip(batch["errors"]["data"][:2], lines[1:3], strict=True):
        interactive = (await http.post("/v1/rerank", json=line["body"])).json()["error"]
        assert (error["message"], error["code"]) == (interactive["message"], interactive["code"])


OPTIONS: list[dict[str, Any]] = [
    {"model": "mini"},
    {"model": "mini", "encoding_format": "base64"},
    {"model": "mini", "encoding_format": "base64", "dimensions": 64},
    {"model": "mini", "input_type": "query", "normalize": False},
    {"model": "mini", "output_dtype": "binary"},
    {"model": "strict"},
]
LONG = "word " * 300
REFUSED: list[dict[str, Any]] = [
    {"input": ["many " * 254] * 9, "model": "mini"},  # more tokens than a request may have
    {"input": "x", "model": "mini", "dimensions": 9999},
    {"input": [[9**9]], "model": "team/own-ids"},
]
"""Requests that are refused when they are computed."""


def test_answers_are_those_of_interactive_requests(guarded: Service) -> None:
    """Those of lines with the same options, which are computed together. Invalid ones fail alone, with the same error.

    The first batch computes its vectors, and the second one takes those of the requests from the result cache, so that all
    bytes are equal. The inputs of each group are different, so that none is computed twice.
    """
    bodies: list[dict[str, Any]] = [
        {"input": value, **options}
        for number, options in enumerate(OPTIONS)
        for value in (f"a {number}", [f"{number}", f"b {number}"], f"\ud800{number}", f"a {number}", f"{number} {LONG}")
    ]
    bodies += [{"input": value, "model": "team/own-ids"} for value in ([101, 7592, 102], [[101, 102], [101, 102]])]
    bodies += [{"input": value, "model": "openai-ids"} for value in ([15339, 1917], [[2000]])]
    for position, body in zip((20, 30, -3), REFUSED, strict=True):
        bodies.insert(position, body)
    computed, _ = answers(guarded, bodies)
    responses = [guarded.http.post("/v1/embeddings", content=json.dumps(body)) for body in bodies]
    kept, batch = answers(guarded, bodies)
    for body, first, second, expected in zip(bodies, computed, kept, responses, strict=True):
        assert json.loads(second)["response"]["status_code"] == expected.status_code, body
        assert second.endswith(b'"body":' + expected.content + b'},"error":null}'), body
        assert_equal_answers(json.loads(first)["response"]["body"], expected.json())
    failures = [
        body for body, line in zip(bodies, kept, strict=True) if json.loads(line)["response"]["status_code"] != 200
    ]
    assert failures == [
        body for body in bodies if body in REFUSED or (body["model"] == "strict" and LONG in body["input"])
    ]
    usages = [response.json().get("usage", {"total_tokens": 0}) for response in responses]
    assert batch["usage"]["total_tokens"] == sum(usage["total_tokens"] for usage in usages)
    counts = {"total": len(bodies), "completed": len(bodies) - len(failures), "failed": len(failures)}
    assert batch["request_counts"] == counts


def answers(service: Service, bodies: list[dict[str, Any]]) -> tuple[list[bytes], dict[str, Any]]:
    """Return the lines of the files of a batch in the order of its requests, and the batch."""
    lines = [
        json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/embeddings", "body": body})
        for number, body in enumerate(bodies)
    ]
    file = service.http.post("/v1/files", files={"file": "\n".join(lines).encode()}, data={"purpose": "batch"}).json()
    fields = {"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
    path = f"/v1/batches/{service.http.post('/v1/batches', json=fields).json()['id']}"
    wait_until(lambda: service.http.get(path).json()["status"] in ("completed", "failed"))
    batch = service.http.get(path).json()
    assert (batch["status"], batch["errors"]) == ("completed", None)
    found = {}
    for name in ("output_file_id", "error_file_id"):
        content = service.http.get(f"/v1/files/{batch[name]}/content").content.splitlines()
        numbers = [int(json.loads(raw)["custom_id"]) for raw in content]
        assert numbers == sorted(numbers)
        found |= dict(zip(numbers, content, strict=True))
    assert sorted(found) == list(range(len(bodies)))
    return [found[number] for number in range(len(bodies))], batch


async def test_groups_of_lines(tmp_path: Path) -> None:
    """Lines with equal options and the same kind of input, up to a size. Lines of rerank and invalid lines are alone."""
    settings = Settings.from_values(cache_dir=tmp_path, max_request_tokens=1000)
    calculator = ApiCalculator(create_app(settings, on_nothing_to_serve=lambda: None).state.services, lambda *_: None)
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    bodies = [
        {"input": "a", "model": "m", "dimensions": 64},
        {"input": ["b", "c"], "dimensions": 64, "model": "m"},
        {"input": "d", "model": "m"},
        {"input": [5, 6], "model": "m"},
        {"input": None, "model": "m"},
        {"input": "e", "model": "m", "tag": deep},
        {"input": [[7], [8]], "model": "m"},
        {"input": "f" * 990, "model": "m"},
        {"input": "g" * 10, "model": "m"},
        {"input": "h", "model": "m", "user": "another"},
    ]
    assert calculator.group("/v1/embeddings", bodies) == [[0, 1], [2, 7], [3, 6], [4], [5], [8, 9]]
    assert calculator.group("/v1/rerank", bodies[:2]) == [[0], [1]]
    assert calculator.group("/v1/embeddings", [{"input": "x"}] * 300) == [list(range(256)), list(range(256, 300))]
