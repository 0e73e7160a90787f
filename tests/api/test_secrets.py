"""What the service must not tell, and lines that nobody else may write, on a service that logs all it can."""

from __future__ import annotations

import itertools
import json
import re
import socket
from contextlib import suppress
from http.client import HTTPConnection
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.api.models import SECRETS
from tests.service import assert_error, wait_until

if TYPE_CHECKING:
    from tests.service import Service

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (DEBUG|INFO|WARNING|ERROR)\s|    ")
FORGED = "2026-01-01 00:00:00.000 INFO    forged"


_NUMBERS = itertools.count()


def after_everything(service: Service) -> tuple[str, str]:
    """Return the log file and standard error, once all requests so far are in them."""
    identifier = f"after-everything-{next(_NUMBERS)}."
    service.http.get("/v1/models", headers={"x-request-id": identifier})
    wait_until(lambda: identifier in service.log_text() and identifier in service.stderr_text())
    return service.log_text(), service.stderr_text()


def test_no_answer_and_no_line_has_a_secret(edge: Service) -> None:
    """Keys and tokens are in no page, error, figure or log line, not even at DEBUG."""
    admin = {"authorization": f"Bearer {SECRETS['admin']}"}
    answers = [edge.http.get(path, headers=admin) for path in ("/docs", "/openapi.json", "/metrics", "/ready", "/v1/models", "/v1/models/mini", "/v1/models/stuck", "/api/x", "/no/such")]  # fmt: skip
    answers += [
        edge.http.post("/api/x", headers={"authorization": f"Bearer {SECRETS['admin']}x"}),
        edge.http.post("/v1/embeddings", content=b"{", headers=admin),
        edge.http.post("/v1/embeddings", json={"input": "x", "model": "nope"}, headers=admin),
    ]
    with suppress(httpx.TimeoutException):  # a download begins, with a token
        edge.http.post("/v1/embeddings", json={"input": "x", "model": "stuck"}, timeout=0.5)
    edge.wait_for_state("stuck", "downloading")
    log, stderr = after_everything(edge)
    for text in (log, stderr, *(answer.text for answer in answers)):
        assert text
        for secret in SECRETS.values():
            assert secret not in text


EVIL = [
    f"a\n{FORGED}",
    f"a\r\n{FORGED}",
    "a\x1b[2J\x1b[31m",
    f"a\u2028{FORGED}\u2029\x85",
    "a\x00b\x08\x7f",
    "a\u202eb",
    "\xff\xfe",
]


@pytest.mark.parametrize("evil", EVIL, ids=ascii)
def test_nothing_that_is_sent_makes_a_line(edge: Service, evil: str) -> None:
    """Paths, ids, models, fields and headers that hold line breaks and terminal codes stay inside their own line."""
    encoded = "".join(f"%{byte:02x}" for byte in evil.encode())
    before = after_everything(edge)[0].count("status=404")
    assert edge.http.get(f"/{encoded}").status_code == 404
    assert edge.http.get(f"/v1/models/{encoded}").status_code == 404
    assert edge.http.post(f"/api/{encoded}").status_code == 401
    assert edge.embed("x", model=evil).status_code == 404
    assert edge.embed("x", model="mini", input_type=evil, user=evil).status_code == 400
    assert edge.embed(evil, model="mini").status_code == 200
    for text in after_everything(edge):
        assert not [line for line in text.split("\n") if line and not LINE.match(line)]
        assert "\x1b" not in text
        assert not set("\r\x00\x08\x7f\x85\u2028\u2029\u202e") & set(text)
    assert edge.log_text().count("status=404") == before + 3


@pytest.mark.parametrize(
    "raw", [b"a\x1b[31m", b"\xfc\xfd", b"a\tb", b"a\x0bb", b"a\rb", b"a\x00b"], ids=ascii
)
def test_headers_as_they_come_over_the_wire(edge: Service, raw: bytes) -> None:
    """A request id or any other header that holds what a terminal obeys is refused or replaced, never repeated."""
    lines = b"".join(
        name + b": " + raw + b"\r\n" for name in (b"X-Request-ID", b"User-Agent", b"Authorization")
    )
    with socket.create_connection(("localhost", edge.port), timeout=120) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n")
        answer = connection.recv(65536)
    assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 "))
    assert re.search(rb"\r\nx-request-id: req_[0-9a-f]{24}\r\n", answer)
    assert raw not in answer
    for text in after_everything(edge):
        assert raw.decode("latin-1") not in text


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "mini/../../etc", "..", ".", "~", "C:\\Windows", "mini%00.json", "file:///etc/passwd"],
)  # fmt: skip
def test_models_name_is_no_path(edge: Service, name: str) -> None:
    """A name from a request is looked up among the served ones and nowhere else."""
    connection = HTTPConnection("localhost", edge.port, timeout=240)  # httpx would tidy the path up
    connection.request("GET", f"/v1/models/{name}")
    described = connection.getresponse()
    text = described.read().decode()
    connection.close()
    assert described.status == 404
    assert json.loads(text)["error"]["code"] in ("model_not_found", "unknown_url")
    answer = edge.embed("x", model=name)
    assert_error(answer, 404, "model_not_found", param="model")
    assert "root:" not in text + answer.text


def test_server_error_tells_nothing_of_the_server(strained: Service) -> None:
    """A 500 has the request's id, and neither a path nor a library's words nor a traceback."""
    response = strained.embed("zebra", model="poisoned")
    assert_error(response, 500, "internal_error", type="server_error")
    message = response.json()["error"]["message"]
    identifier = response.headers["x-request-id"]
    assert message == f"The server failed on this request. Its log says why under request id {identifier}."
