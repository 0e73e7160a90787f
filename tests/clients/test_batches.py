"""The Batch API with the SDKs of OpenAI for Python and JavaScript: upload, create, poll, download, cancel, expire."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import time
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.api.helpers import assert_equal_answers
from tests.clients.helpers import IGNORE_WARNINGS, KEY
from tests.kind_models import RERANKERS
from tests.service import BUNDLED, Service, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from openai.types import Batch

pytestmark = [pytest.mark.slow, IGNORE_WARNINGS]

OTHER_KEY = "sk-clients-other"
WAITING = ("validating", "in_progress", "finalizing", "cancelling")
TEXTS = ["a cat sits on the mat", "向量数据库", "Ein Hund läuft.", "x " * 400]
DOCUMENTS = ["Open the settings and choose Reset.", "The weather is nice today."]


def request(custom_id: str, body: Mapping[str, Any], url: str = "/v1/embeddings") -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


EMBEDDINGS: list[dict[str, Any]] = [
    *(request(f"text-{number}", {"model": "mini", "input": text}) for number, text in enumerate(TEXTS)),
    request("base64", {"model": "mini", "input": TEXTS[:2], "encoding_format": "base64", "dimensions": 64}),
    request("too long", {"model": "mini", "input": TEXTS, "truncate": "NONE"}),
    request("no ranking", {"model": "reranker", "input": "x"}),
]
RERANKS = [
    request("best", {"model": "reranker", "query": "password", "documents": DOCUMENTS, "top_n": 1, "return_documents": True}, "/v1/rerank"),
    request("tei", {"model": "reranker", "query": "password", "texts": DOCUMENTS, "raw_scores": True}, "/v1/rerank"),
    request("wrong kind", {"model": "mini", "query": "password", "documents": DOCUMENTS}, "/v1/rerank"),
]  # fmt: skip
INVALID = [
    request("1", {"model": "mini", "input": []}),
    request("1", {"model": "mini", "input": "x"}),
    request("3", {"model": "nope", "input": "x"}),
]
STUCK = [request("stuck", {"model": "stuck", "input": "x"}), request("mini", {"model": "mini", "input": "x"})]
"""Requests of which the first one waits for a model that never finishes its download."""


@pytest.fixture(scope="module")
def batching(tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str) -> Iterator[Service]:
    """Yield a service with two keys and two models, and one that never finishes its download."""
    directory = tmp_path_factory.mktemp("batching")
    with socket.create_server(("127.0.0.1", 0)) as silent_hub:
        mapping = {
            "mini": {"name": BUNDLED, "precision": "fp32", "dimensions": "any"},
            "reranker": {"name": "test/reranker", "path": str(RERANKERS["bert"](directory / "reranker"))},
            "stuck": {
                "name": "test/stuck",
                "source": "huggingface",
                "endpoint": f"http://127.0.0.1:{silent_hub.getsockname()[1]}",
            },
        }
        settings = {
            "CACHE_DIR": service_cache,
            "BATCH_DIR": str(directory / "batch"),
            "BACKEND": backend,
            "MODEL_MAPPING": json.dumps(mapping),
            "PRELOAD_MODELS": "mini,reranker",
            "API_KEYS": f"{KEY},{OTHER_KEY}",
            "LOAD_WAIT_S": "1",
        }
        with Service(directory / "service", SERVE_CACHED="false", **settings) as service:
            service.http.headers["authorization"] = f"Bearer {KEY}"
            yield service.wait()


@pytest.fixture
def client(batching: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{batching.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def jsonl(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def create(client: openai.OpenAI, lines: Sequence[Mapping[str, Any]], endpoint: Any, **fields: Any) -> Batch:
    file = client.files.create(file=("requests.jsonl", jsonl(lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields)


def ended(client: openai.OpenAI, batch: Batch, states: Sequence[str] = WAITING) -> Batch:
    wait_until(lambda: client.batches.retrieve(batch.id).status not in states)
    return client.batches.retrieve(batch.id)


def read(client: openai.OpenAI, file_id: str | None) -> list[bytes]:
    return [] if file_id is None else client.files.content(file_id).content.splitlines()


def assert_results(
    service: Service, lines: Sequence[Mapping[str, Any]], output: Sequence[bytes], errors: Sequence[bytes]
) -> None:
    """Check that each line is in one of both files, in order, with the response of an interactive request."""
    found: dict[str, tuple[bytes, bool]] = {}
    for raw, is_error in [(line, False) for line in output] + [(line, True) for line in errors]:
        parsed = json.loads(raw)
        assert parsed.keys() == {"id", "custom_id", "response", "error"}
        assert parsed["error"] is None
        assert parsed["custom_id"] not in found
        found[parsed["custom_id"]] = (raw, is_error)
    succeeded = [name for name, (_, is_error) in found.items() if not is_error]
    assert succeeded == [line["custom_id"] for line in lines if line["custom_id"] in succeeded]
    assert sorted(found) == sorted(line["custom_id"] for line in lines)
    for line in lines:
        raw, is_error = found[line["custom_id"]]
        expected = service.http.post(line["url"], json=line["body"])
        response = json.loads(raw)["response"]
        assert (response["status_code"], response["request_id"][:4]) == (expected.status_code, "req_")
        assert is_error == (expected.status_code >= 400)
        if line["url"] == "/v1/embeddings":
            assert_equal_answers(response["body"], expected.json())
        else:
            assert_same(response["body"], expected.json())


def assert_same(left: Any, right: Any) -> None:
    """Check that values of JSON are equal. Ids differ, and scores can differ in the last digits."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left.keys() - {"id"}:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_same(*pair)
    else:
        assert left == (pytest.approx(right, abs=1e-5) if isinstance(left, float) else right)


@pytest.mark.parametrize(
    ("lines", "endpoint"), [(EMBEDDINGS, "/v1/embeddings"), (RERANKS, "/v1/rerank")], ids=["embeddings", "rerank"]
)
def test_batch(batching: Service, client: openai.OpenAI, lines: list[dict[str, Any]], endpoint: str) -> None:
    """All requests are answered as interactive ones are. Those that fail are in the error file."""
    created = create(client, lines, endpoint, metadata={"run": "python"}, output_expires_after={"anchor": "created_at", "seconds": 3600})  # fmt: skip
    assert (created.status, created.object, created.metadata) == ("validating", "batch", {"run": "python"})
    batch = ended(client, created)
    assert (batch.status, batch.errors, batch.model) == ("completed", None, lines[0]["body"]["model"])
    assert batch.output_file_id is not None
    assert batch.error_file_id is not None
    output, errors = read(client, batch.output_file_id), read(client, batch.error_file_id)
    assert_results(batching, lines, output, errors)
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": len(lines), "completed": len(output), "failed": len(errors)}
    tokens = sum(sum((json.loads(line)["response"]["body"].get("usage") or {}).values()) // 2 for line in output if b'"usage"' in line)  # fmt: skip
    assert batch.usage is not None
    assert batch.usage.total_tokens >= tokens > 0
    assert batch.created_at <= (batch.in_progress_at or 0) <= (batch.finalizing_at or 0) <= (batch.completed_at or 0)
    assert batch.expires_at == batch.created_at + 24 * 3600
    for file_id in (batch.output_file_id, batch.error_file_id):
        file = client.files.retrieve(file_id)
        assert (file.purpose, file.status) == ("batch_output", "processed")
        assert file.expires_at == file.created_at + 3600


def test_invalid_file(client: openai.OpenAI) -> None:
    """Nothing is computed, and each invalid line is reported."""
    batch = ended(client, create(client, INVALID, "/v1/embeddings"))
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.errors is not None
    assert [(error.line, error.code, error.param) for error in batch.errors.data or ()] == [
        (1, "invalid_input", "body.input"),
        (2, "duplicate_custom_id", "custom_id"),
        (3, "model_not_found", "body.model"),
    ]


def test_cancelled_batch(client: openai.OpenAI) -> None:
    """A batch waits for a model that is being loaded, and says so. It can be cancelled once, and keeps what was computed."""
    batch = create(client, STUCK, "/v1/embeddings")
    wait_until(lambda: "stuck" in ((client.batches.retrieve(batch.id).model_extra or {}).get("pause_reason") or ""))
    with pytest.raises(openai.ConflictError):
        client.files.delete(batch.input_file_id)
    assert client.batches.cancel(batch.id).status == "cancelling"
    cancelled = ended(client, batch)
    assert cancelled.status == "cancelled"
    (answered,) = map(json.loads, read(client, cancelled.output_file_id))
    assert (answered["custom_id"], answered["response"]["status_code"]) == ("mini", 200)
    (waiting,) = map(json.loads, read(client, cancelled.error_file_id))
    assert (waiting["custom_id"], waiting["response"]) == ("stuck", None)
    assert waiting["error"]["code"] == "batch_cancelled"
    assert cancelled.request_counts is not None
    assert cancelled.request_counts.model_dump() == {"total": 2, "completed": 1, "failed": 1}
    assert cancelled.cancelling_at is not None
    assert (cancelled.cancelled_at or 0) >= cancelled.cancelling_at
    with pytest.raises(openai.ConflictError, match="Cannot cancel a batch with status 'cancelled'"):
        client.batches.cancel(batch.id)
    assert client.files.delete(batch.input_file_id).deleted


def test_expired_batch(batching: Service, client: openai.OpenAI) -> None:
    """Requests without an answer are in the error file. Its time is set in the database, because no test waits a day."""
    batch = create(client, STUCK, "/v1/embeddings")
    wait_until(lambda: "stuck" in ((client.batches.retrieve(batch.id).model_extra or {}).get("pause_reason") or ""))
    with sqlite3.connect(batching.directory.parent / "batch" / "batch.sqlite3", timeout=60) as database:
        database.execute("UPDATE batches SET expires_at = ? WHERE id = ?", (time.time() - 1, batch.id))
    expired = ended(client, batch)
    assert (expired.status, expired.expired_at is not None) == ("expired", True)
    lines = {line["custom_id"]: line for line in map(json.loads, read(client, expired.error_file_id))}
    assert lines["stuck"]["error"]["code"] == "batch_expired"
    assert lines["stuck"]["response"] is None
    assert [json.loads(line)["custom_id"] for line in read(client, expired.output_file_id)] == ["mini"]


def test_lists_and_keys(batching: Service, client: openai.OpenAI) -> None:
    """Lists have pages, and each key has its own batches."""
    batches = [ended(client, create(client, EMBEDDINGS[:1], "/v1/embeddings")).id for _ in range(3)]
    listed = [batch.id for batch in client.batches.list(limit=2)]  # follows the pages
    assert listed[:3] == batches[::-1]
    with openai.OpenAI(base_url=f"{batching.url}/v1", api_key=OTHER_KEY, max_retries=0) as other:
        assert list(other.batches.list()) == []
        assert list(other.files.list()) == []
        for call in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError, match="No batch found with id"):
                call(batches[0])
        with pytest.raises(openai.NotFoundError, match="No such File object"):
            other.batches.create(
                input_file_id=client.batches.retrieve(batches[0]).input_file_id,
                endpoint="/v1/embeddings",
                completion_window="24h",
            )


async def test_asynchronous_client(batching: Service) -> None:
    """The asynchronous client can use the routes, too, with a file of its own way to send it."""
    async with openai.AsyncOpenAI(base_url=batching.url, api_key=KEY, max_retries=0) as client:
        file = await client.files.create(file=jsonl(EMBEDDINGS[:1]), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})  # fmt: skip
        assert file.expires_at == file.created_at + 3600
        assert (await client.files.content(file.id)).content == jsonl(EMBEDDINGS[:1])
        with pytest.raises(openai.BadRequestError, match="Invalid value for 'endpoint'"):
            await client.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")


def test_javascript(batching: Service, packages: Path) -> None:
    """The SDK for JavaScript uploads, creates, polls, downloads, cancels and deletes."""
    lines = {"/v1/embeddings": EMBEDDINGS, "/v1/rerank": RERANKS}
    argument = json.dumps({"url": batching.url, "key": KEY, "lines": lines, "invalid": INVALID, "stuck": STUCK})
    done = subprocess.run(
        ["node", "batches.mjs", argument], cwd=packages, capture_output=True, encoding="utf-8", timeout=240
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for endpoint, result in found["results"].items():
        batch = result["batch"]
        assert (batch["status"], batch["metadata"]) == ("completed", {"run": "node"})
        assert result["file"]["expires_at"] == result["file"]["created_at"] + 7200
        names = [line["custom_id"] for line in [*result["lines"], *result["errors"]]]
        assert sorted(names) == sorted(line["custom_id"] for line in lines[endpoint])
        assert {line["response"]["status_code"] for line in result["lines"]} == {200}
        assert {line["response"]["status_code"] for line in result["errors"]} == {400}
        assert batch["request_counts"] == {
            "total": len(lines[endpoint]),
            "completed": len(result["lines"]),
            "failed": len(result["errors"]),
        }
    assert found["failed"]["status"] == "failed"
    assert [error["line"] for error in found["failed"]["errors"]["data"]] == [1, 2, 3]
    assert found["cancelled"]["status"] == "cancelled"
    assert found["conflict"] == {"name": "ConflictError", "status": 409, "code": "state_conflict"}
    assert {result["batch"]["id"] for result in found["results"].values()} < set(found["batches"])
    assert {result["file"]["id"] for result in found["results"].values()} < set(found["files"])
    assert len(found["batches"]) == len(set(found["batches"]))
    assert found["deleted"]["deleted"] is True
    assert found["missing"] == {"name": "NotFoundError", "status": 404, "code": "file_not_found"}


def test_metrics(batching: Service, client: openai.OpenAI) -> None:
    """Batches by state, lines and tokens of this service, and the size of all files."""
    before = batching.figure("emb_provider_batch_job_lines_total", outcome="completed")
    ended(client, create(client, EMBEDDINGS[:2], "/v1/embeddings"))
    assert batching.figure("emb_provider_batch_job_lines_total", outcome="completed") == before + 2
    assert batching.figure("emb_provider_batch_job_tokens_total") > 0
    wait_until(lambda: batching.figure("emb_provider_batch_jobs", state="completed") >= 1)
    assert batching.figure("emb_provider_batch_file_bytes") > 0
