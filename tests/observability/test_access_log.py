"""The log of a running service: lines of requests, and lines at startup."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from tests.service import BUNDLED

if TYPE_CHECKING:
    from tests.service import Service

ACCESS = "emb_model_provider.access"


def test_each_request_has_one_line(service: Service) -> None:
    """The line has the model, the numbers of inputs and tokens, and the times."""
    headers = {"x-request-id": "log-test-1"}
    service.http.post(
        "/v1/embeddings", json={"input": ["hello", "world"], "model": "all-MiniLM-L6-v2"}, headers=headers
    )
    (line,) = service.logged(request_id="log-test-1")
    assert (line["logger"], line["level"], line["status"], line["model"]) == (ACCESS, "INFO", 200, BUNDLED)
    assert (line["inputs"], line["tokens"]) == (2, 6)
    parts = [line[name] for name in ("queue_ms", "tokenize_ms", "inference_ms")]
    assert all(isinstance(part, float | int) and part >= 0 for part in parts)
    assert 0 < sum(parts) <= line["ms"]
    assert line["message"].startswith("POST /v1/embeddings status=200 ")
    assert f"model={BUNDLED} inputs=2 tokens=6 " in line["message"]
    age = datetime.now(UTC) - datetime.fromisoformat(line["time"])
    assert 0 <= age.total_seconds() < 60


@pytest.mark.parametrize(
    ("body", "status", "model"), [({"input": "x", "model": "no\nsuch"}, 404, None), ({"input": "x", "dimensions": 3}, 400, BUNDLED)]
)  # fmt: skip
def test_error_has_one_line(service: Service, body: dict[str, object], status: int, model: str | None) -> None:
    """The line of an error does not contain an unknown model name."""
    service.http.post("/v1/embeddings", json=body, headers={"x-request-id": f"log-test-{status}"})
    (line,) = service.logged(request_id=f"log-test-{status}")
    assert (line["status"], line.get("model")) == (status, model)
    assert "such" not in json.dumps(line)


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_health_checks_and_scrapes_are_not_logged(service: Service, path: str) -> None:
    """Requests that machines send every few seconds do not fill the log."""
    service.http.get(path, headers={"x-request-id": "health-check"})
    service.http.get("/v1/models", headers={"x-request-id": f"after-{path[1:]}"})
    assert service.logged(request_id=f"after-{path[1:]}")
    assert service.log_lines(request_id="health-check") == []


def test_other_routes_are_logged_without_query(service: Service) -> None:
    """Unknown paths are logged too. The query string is not, because it may contain a secret."""
    service.http.get("/no/such?token=secret-in-a-query", headers={"x-request-id": "elsewhere"})
    (line,) = service.logged(request_id="elsewhere")
    assert line["message"].startswith("GET /no/such status=404")
    assert "secret-in-a-query" not in service.log_text()


def test_lines_cannot_be_forged(service: Service) -> None:
    """For any path, input and model name, the file and stderr contain valid JSON lines only."""
    evil = '\n{"level": "FORGED"}\r\n\x1b[31m\u2028\u202e\x00'
    service.http.post("/v1/embeddings", json={"input": evil, "model": evil, "encoding_format": evil})
    service.embed(evil, model=evil)
    service.http.get("/x%0A%7B%22level%22%3A%22FORGED%22%7D%0D%1B%5B31m%E2%80%A8%E2%80%AE")
    service.http.get("/v1/models/%0A%7B%22level%22%3A%22FORGED%22%7D", headers={"x-request-id": "after-evil"})
    service.logged(request_id="after-evil")
    for text in (service.log_text(), service.stderr_text()):
        lines = [json.loads(line) for line in text.split("\n") if line]
        assert all(line["level"] in ("INFO", "WARNING", "ERROR") for line in lines)
        assert all("time" in line and "message" in line and "logger" in line for line in lines)
        assert "\x1b" not in text
        assert "\u2028" not in text
        assert "\u202e" not in text


def test_startup_logs_the_model_and_a_command_to_try(service: Service) -> None:
    """The first lines name the model, its address and a command that works."""
    messages = [line["message"] for line in service.log_lines()]
    assert any(message.startswith(f"serving {BUNDLED} at {service.url}") for message in messages)
    assert any(message.startswith(f"try it: curl {service.url}/v1/embeddings") for message in messages)
