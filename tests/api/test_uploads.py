"""Uploads to the real service: memory, and clients that send slowly."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.api.helpers import connect

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from tests.service import Service

pytestmark = pytest.mark.slow

SIZE = 200_000_000
MB = 1_000_000
HEAD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
TAIL = b'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'
FORM = {"content-type": "multipart/form-data; boundary=b"}


def block(number: int) -> bytes:
    """Return a MB of JSON lines."""
    line = json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}})
    return (line + "\n").encode().ljust(MB, b"\n")


def memory(service: Service, field: str) -> int:
    """Return a size from the status of the process, in bytes."""
    status = Path(f"/proc/{service.process.pid}/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_of_a_large_file(service: Service) -> None:
    """A file of 200 MB takes less than 50 MB of memory, while it is uploaded and while it is downloaded."""
    service.http.get("/v1/files")  # opens the database
    digest = hashlib.sha256()

    def body() -> Iterator[bytes]:
        yield HEAD
        for number in range(SIZE // MB):
            digest.update(block(number))
            yield block(number)
        yield TAIL

    # From here on, the peak is that of the upload.
    Path(f"/proc/{service.process.pid}/clear_refs").write_text("5", encoding="ascii")
    before = memory(service, "VmRSS")
    response = service.http.post("/v1/files", content=body(), headers=FORM)
    file = response.json()
    assert file["bytes"] == SIZE, response.text
    received = hashlib.sha256()
    with service.http.stream("GET", f"/v1/files/{file['id']}/content") as content:
        for piece in content.iter_bytes():
            received.update(piece)
    peak = memory(service, "VmHWM")
    assert received.digest() == digest.digest()
    assert service.http.delete(f"/v1/files/{file['id']}").json()["deleted"]
    assert peak - before < 50 * MB


def send(connection: socket.socket, length: int) -> None:
    head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM['content-type']}\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + HEAD)


def read_response(connection: socket.socket) -> bytes:
    received = b""
    while b"}" not in received and (piece := connection.recv(65536)):
        received += piece
    return received


def test_an_upload_may_take_longer_than_a_request(impatient: Service) -> None:
    """Each MB has the time of a whole request, which is 3 s here."""
    blocks = [block(number) for number in range(4)]
    with connect(impatient) as connection:
        send(connection, len(HEAD + b"".join(blocks) + TAIL))
        for each in blocks:
            connection.sendall(each)
            time.sleep(1.5)
        connection.sendall(TAIL)
        response = read_response(connection)
    assert response.startswith(b"HTTP/1.1 200 "), response
    assert json.loads(response.partition(b"\r\n\r\n")[2])["bytes"] == 4 * MB


def test_an_upload_that_stops_is_ended(impatient: Service) -> None:
    """Also if it sends a byte now and then."""
    with connect(impatient) as connection:
        send(connection, 10 * MB)
        connection.settimeout(0.3)
        received = b""
        while b"}" not in received:
            try:
                connection.sendall(b"x")
                received += connection.recv(65536)
            except TimeoutError:
                continue
    assert received.startswith(b"HTTP/1.1 408 "), received
    assert impatient.http.get("/v1/files").status_code == 200
