"""Secrets stay out of responses and logs, and clients cannot forge log lines."""

from __future__ import annotations

import itertools
import json
import re
from contextlib import suppress
from http.client import HTTPConnection
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.api.helpers import SECRETS, connect
from tests.service import assert_error, wait_until

if TYPE_CHECKING:
    from tests.service import Service

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (DEBUG|INFO|WARNING|ERROR)\s|    ")
FORGED = "2026-01-01 00:00:00.000 INFO    forged"
DANGEROUS_TEXTS = [
    f"a\n{FORGED}",
    f"a\r\n{FORGED}",
    "a\x1b[2J\x1b[31m",
    f"a\u2028{FORGED}\u2029\x85",
    "a\x00b\x08\x7f",
    "a\u202eb",
    "\xff\xfe",
]

_numbers = itertools.count()


def read_logs(service: Service) -> tuple[str, str]:
    """Return the log file and standard error, after all requests so far were written to them."""
    identifier = f"last-request-{next(_numbers)}."
    service.http.get("/v1/models", headers={"x-request-id": identifier})
    wait_until(lambda: identifier in service.log_text() and identifier in service.stderr_text())
    return service.log_text(), service.stderr_text()


def test_secrets_are_in_no_response_and_no_log(impatient: Service) -> None:
    """Keys and tokens are in no page, error, metric or log line, not even at DEBUG."""
    admin = {"authorization": f"Bearer {SECRETS['admin']}"}
    responses = [impatient.http.get(path, headers=admin) for path in ("/docs", "/openapi.json", "/metrics", "/ready", "/v1/models", "/v1/models/mini", "/v1/models/stuck", "/api/x", "/no/such")]  # fmt: skip
    responses += [
        impatient.http.post("/api/x", headers={"authorization": f"Bearer {SECRETS['admin']}x"}),
        impatient.http.post("/v1/embeddings", content=b"{", headers=admin),
        impatient.http.post("/v1/embeddings", json={"input": "x", "model": "nope"}, headers=admin),
    ]
    with suppress(httpx.TimeoutException):  # a download begins, with a token
        impatient.http.post("/v1/embeddings", json={"input": "x", "model": "stuck"}, timeout=0.5)
    impatient.wait_for_state("stuck", "downloading")
    log, stderr = read_logs(impatient)
    for text in (log, stderr, *(response.text for response in responses)):
        assert text
        for secret in SECRETS.values():
            assert secret not in text


@pytest.mark.parametrize("text", DANGEROUS_TEXTS, ids=ascii)
def test_requests_cannot_forge_log_lines(impatient: Service, text: str) -> None:
    """Line breaks and escape codes in paths, ids, models, fields and headers stay within one log line."""
    encoded = "".join(f"%{byte:02x}" for byte in text.encode())
    before = read_logs(impatient)[0].count("status=404")
    assert impatient.http.get(f"/{encoded}").status_code == 404
    assert impatient.http.get(f"/v1/models/{encoded}").status_code == 404
    assert impatient.http.post(f"/api/{encoded}").status_code == 401
    assert impatient.embed("x", model=text).status_code == 404
    assert impatient.embed("x", model="mini", input_type=text, user=text).status_code == 400
    assert impatient.embed(text, model="mini").status_code == 200
    for log in read_logs(impatient):
        assert not [line for line in log.split("\n") if line and not LINE.match(line)]
        assert "\x1b" not in log
        assert not set("\r\x00\x08\x7f\x85\u2028\u2029\u202e") & set(log)
    assert impatient.log_text().count("status=404") == before + 3


@pytest.mark.parametrize("raw", [b"a\x1b[31m", b"\xfc\xfd", b"a\tb", b"a\x0bb", b"a\rb", b"a\x00b"], ids=ascii)
def test_control_characters_in_headers(impatient: Service, raw: bytes) -> None:
    """A header with control characters is rejected or replaced, and not repeated."""
    lines = b"".join(name + b": " + raw + b"\r\n" for name in (b"X-Request-ID", b"User-Agent", b"Authorization"))
    with connect(impatient) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n")
        response = connection.recv(65536)
    assert response.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 "))
    assert re.search(rb"\r\nx-request-id: req_[0-9a-f]{24}\r\n", response)
    assert raw not in response
    for text in read_logs(impatient):
        assert raw.decode("latin-1") not in text


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "mini/../../etc", "..", ".", "~", "C:\\Windows", "mini%00.json", "file:///etc/passwd"],
)  # fmt: skip
def test_name_of_a_model_is_not_a_path(impatient: Service, name: str) -> None:
    """A name in a request is only compared with the served models."""
    connection = HTTPConnection("localhost", impatient.port, timeout=240)  # because httpx normalizes paths
    connection.request("GET", f"/v1/models/{name}")
    described = connection.getresponse()
    text = described.read().decode()
    connection.close()
    assert described.status == 404
    assert json.loads(text)["error"]["code"] in ("model_not_found", "unknown_url")
    response = impatient.embed("x", model=name)
    assert_error(response, 404, "model_not_found", param="model")
    assert "root:" not in text + response.text


def test_server_error_has_no_details(strained: Service) -> None:
    """A 500 contains the request id, and no path, library message or traceback."""
    response = strained.embed("zebra", model="poisoned")
    assert_error(response, 500, "internal_error", type="server_error")
    message = response.json()["error"]["message"]
    identifier = response.headers["x-request-id"]
    assert message == f"The server failed to process this request. See request id {identifier} in its log."
