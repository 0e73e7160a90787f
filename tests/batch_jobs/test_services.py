"""Two services on one PostgreSQL database work on one batch. One is shut down and one is killed while they do."""

from __future__ import annotations

import json
import signal
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.service import Service, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.postgresql import PostgreSQL

pytestmark = pytest.mark.slow

COUNT = 2500
TEXT = "The quick brown fox jumps over the lazy dog, and the cat sits on the mat. " * 3


def start(directory: Path, cache: str, url: str) -> Service:
    return Service(
        directory,
        CACHE_DIR=cache,
        BATCH_DIR=str(directory.parent / "shared"),
        DATABASE_URL=url,
        MODEL_PRECISION="fp32",
        RESULT_CACHE_MB="0",
    )


def answered(service: Service) -> float:
    return service.figure("emb_provider_batch_job_lines_total", outcome="completed")


def batch_of(service: Service, batch_id: str) -> dict[str, Any]:
    batch: dict[str, Any] = service.http.get(f"/v1/batches/{batch_id}").json()
    return batch


def test_replicas_share_a_batch(tmp_path: Path, service_cache: str, postgresql: PostgreSQL) -> None:
    """Each request is answered once, with the vector that an interactive request gets."""
    url = postgresql.create_schema()
    requests = [
        {"custom_id": f"{n}", "method": "POST", "url": "/v1/embeddings", "body": {"input": f"{n} {TEXT}", "encoding_format": "base64"}}
        for n in range(COUNT)
    ]  # fmt: skip
    content = "".join(json.dumps(request) + "\n" for request in requests).encode()
    with (
        start(tmp_path / "first", service_cache, url) as first,
        start(tmp_path / "second", service_cache, url) as second,
    ):
        first.wait()
        second.wait()
        file_id = first.http.post("/v1/files", files={"file": content}, data={"purpose": "batch"}).json()["id"]
        assert second.http.get(f"/v1/files/{file_id}/content").content == content
        fields = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
        batch_id = second.http.post("/v1/batches", json=fields).json()["id"]
        wait_until(lambda: answered(first) and answered(second))
        assert first.stop() == 0
        at_stop = batch_of(second, batch_id)["request_counts"]["completed"]
        wait_until(lambda: batch_of(second, batch_id)["request_counts"]["completed"] > at_stop)
        second.signal(signal.SIGKILL)
        second.ended()
    with start(tmp_path / "third", service_cache, url) as third:
        third.wait()
        assert batch_of(third, batch_id)["status"] == "in_progress"
        wait_until(lambda: batch_of(third, batch_id)["status"] == "completed", 400)
        batch = batch_of(third, batch_id)
        assert batch["request_counts"] == {"total": COUNT, "completed": COUNT, "failed": 0}
        assert batch["error_file_id"] is None
        output = third.http.get(f"/v1/files/{batch['output_file_id']}/content").content
        lines = [json.loads(line) for line in output.splitlines()]
        assert [line["custom_id"] for line in lines] == [request["custom_id"] for request in requests]
        assert Counter(line["response"]["status_code"] for line in lines) == {200: COUNT}
        assert 0 < answered(third) < COUNT
        body = third.http.post("/v1/embeddings", json={"input": f"7 {TEXT}"}).json()
        assert lines[7]["response"]["body"]["usage"] == body["usage"]
        deleted = third.http.delete(f"/v1/files/{batch['output_file_id']}").json()
        assert deleted["deleted"] is True


def test_wrong_databases_stop_the_start(tmp_path: Path) -> None:
    """With one line that names the setting, and without the password."""
    for url in ("mysql://user:hush-password@db/x", "postgresql://"):
        with Service(tmp_path / "wrong", DATABASE_URL=url) as service:
            assert service.ended() == 1
        (line,) = service.stderr_text().splitlines()
        assert line.startswith("error: EMB_PROVIDER_DATABASE_URL")
        assert "postgresql+psycopg://user:password@host/database" in line
        assert "hush-password" not in line


def test_a_database_that_does_not_answer(tmp_path: Path, service_cache: str, postgresql: PostgreSQL) -> None:
    """The service starts and serves requests; batches get 503 until the database is reached."""
    url = postgresql.create_schema().replace(f":{postgresql.port}/", ":1/")
    with start(tmp_path / "service", service_cache, url) as service:
        service.wait()
        assert service.embed("hello").status_code == 200
        response = service.http.get("/v1/batches")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "database_unavailable")
        assert service.http.get("/metrics").status_code == 200
        assert service.logged(logger="emb_model_provider.api.batch_service", level="WARNING")
