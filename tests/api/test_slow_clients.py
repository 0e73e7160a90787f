"""Clients that send or read slowly, or send too much at once: each takes bounded memory and time."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import select
import socket
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from emb_model_provider.api.limits import ConnectionLimiter
from emb_model_provider.settings import LimitSettings
from tests.api.helpers import KEYS, MANY_TEXTS, connect
from tests.service import Service, assert_error, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n"
LENGTH = b"Content-Length: 1000\r\n\r\n"
TRICKLE_S = 0.2
RECEIVE_TIMEOUT_S = 3.0  # of `impatient`


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    raw = b""
    with suppress(ConnectionError):
        while chunk := connection.recv(65536):
            raw += chunk
    return raw


def statuses(raw: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d+) ", raw)]


# --- slow senders -------------------------------------------------------------------------------------

SLOW: dict[str, tuple[bytes, bytes]] = {
    "nothing": (b"", b""),
    "empty lines": (b"\r\n", b"\r\n"),
    "half a head": (POST, b""),
    "a head that grows": (POST, b"X-A: b\r\n"),
    "no body": (POST + b"X-Request-Id: slow-no-body\r\n" + LENGTH, b""),
    "half a body": (POST + LENGTH + b'{"input": ', b""),
    "a body that grows": (POST + LENGTH + b'{"input": "', b"x"),
    "chunks that grow": (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "a body of no use": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + LENGTH, b"x"),
    "a second request": (HEALTH + POST, b""),
    "a second body": (HEALTH + POST + LENGTH, b"x"),
}
"""What is sent at once, and what is sent repeatedly after it."""
EXPECTED_STATUSES = {"nothing": [], "empty lines": [], "a body of no use": [200], "a second request": [200, 408], "a second body": [200, 408]}  # fmt: skip


class SlowClients:
    """What the service sent to several clients at the same time."""

    def __init__(self) -> None:
        self.received: dict[str, bytes] = {}
        """What each slow client received until its connection was closed."""
        self.idle: list[bytes] = []
        """What an idle connection received before and after the others were closed."""
        self.working: httpx.Response
        """The response to a request that the service took long for."""


@pytest.fixture(scope="module")
def slow(impatient: Service) -> SlowClients:
    """Return the results of slow clients, after the service has closed their connections."""
    slow = SlowClients()

    def run_client(name: str) -> None:
        at_once, repeatedly = SLOW[name]
        with connect(impatient) as connection:
            connection.sendall(at_once)
            closed = threading.Event()

            def trickle() -> None:
                with suppress(OSError):
                    while repeatedly and not closed.wait(TRICKLE_S):
                        connection.sendall(repeatedly)

            trickling = threading.Thread(target=trickle)
            trickling.start()
            slow.received[name] = read_all(connection)
            closed.set()
            trickling.join()

    threads = [threading.Thread(target=run_client, args=(name,)) for name in SLOW]
    with connect(impatient) as idle:
        idle.sendall(HEALTH)
        slow.idle.append(idle.recv(65536))
        for thread in threads:
            thread.start()
        assert impatient.embed("others are answered").status_code == 200
        slow.working = impatient.embed("x", model="stuck")
        for thread in threads:
            thread.join()
        idle.sendall(HEALTH)
        slow.idle.append(idle.recv(65536))
    return slow


@pytest.mark.parametrize("name", SLOW)
def test_slow_request_times_out(slow: SlowClients, name: str) -> None:
    """A client that does not complete its request in time gets 408, unless it sent nothing; it is disconnected."""
    raw = slow.received[name]
    expected = EXPECTED_STATUSES.get(name, [408])
    assert statuses(raw) == expected
    if expected[-1:] == [408]:
        head, _, body = raw[raw.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
        assert b"connection: close" in head
        assert b"x-request-id: " in head
        error = json.loads(body)["error"]
        assert (error["code"], error["type"]) == ("request_timeout", "invalid_request_error")


def test_slow_request_is_logged(impatient: Service, slow: SlowClients) -> None:
    """The access log has the status that the client got."""
    assert slow.received["no body"]
    wait_until(lambda: "request_id=slow-no-body" in impatient.log_text())
    (line,) = [line for line in impatient.log_text().splitlines() if "request_id=slow-no-body" in line]
    assert "status=408" in line


def test_timeout_applies_only_to_clients(slow: SlowClients) -> None:
    """A request that the service takes long for is answered, and an idle connection stays open for its next request."""
    assert_error(slow.working, 503, "model_not_ready", type="server_error", param="model", phrase="downloading")
    assert slow.working.elapsed.total_seconds() > 2 * RECEIVE_TIMEOUT_S, "the request was too fast for this test"
    assert [statuses(raw) for raw in slow.idle] == [[200], [200]]


# --- slow readers -------------------------------------------------------------------------------------


def test_client_that_does_not_read(impatient: Service) -> None:
    """Responses are not computed ahead of a client that does not read, and its connection is closed in the end."""
    body = json.dumps({"model": "mini", "input": ["a"] * 400}).encode()
    request = POST + b"X-Request-Id: unread\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(120)
        connection.connect(("127.0.0.1", impatient.port))
        connection.sendall(request * 12)
        wait_until(lambda: "request_id=unread" in impatient.log_text())
        poll = select.poll()
        poll.register(connection, select.POLLERR | select.POLLHUP)
        assert poll.poll(120_000), "the connection was not closed"
    answered = impatient.log_text().count("request_id=unread")
    assert 1 <= answered <= 6, "the buffers of the operating system hold one or two of these responses"
    assert impatient.embed("x", model="mini").status_code == 200


def test_client_that_reads_slowly(impatient: Service) -> None:
    """A client that reads slowly gets all responses in order, also those to pipelined requests."""
    bodies = [json.dumps({"model": "mini", "input": ["a"] * count}).encode() for count in (300, 1, 300, 2)]
    with connect(impatient) as connection:
        connection.sendall(b"".join(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in bodies))
        reader = connection.makefile("rb")
        for count in (300, 1, 300, 2):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += reader.readline()
            match = re.search(rb"content-length: (\d+)", head)
            assert match is not None
            length = int(match[1])
            time.sleep(0.3)
            assert len(json.loads(reader.read(length))["data"]) == count


# --- too many requests, headers and connections -------------------------------------------------------


def test_endless_pipeline(impatient: Service) -> None:
    """Of thousands of pipelined requests, some are answered in order; then the connection is closed."""
    with connect(impatient) as connection:
        with suppress(ConnectionError):
            connection.sendall(HEALTH * 20_000)
        answered = statuses(read_all(connection))
    assert 1 <= len(answered) <= 100
    assert set(answered) == {200}


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"X-A: b\r\n" * 10),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: ", b"x" * 5000),
        (b"GET /", b"x" * 5000),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX-A: ", b"x" * 5000),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x" * 5000),
    ],
    ids=["headers", "header", "path", "trailer", "chunk extension"],
)
def test_endless_head(service: Service, start: bytes, more: bytes) -> None:
    """Everything except the body is limited: the client gets 431, and the connection is closed."""
    with connect(service) as connection:
        connection.sendall(start)
        with suppress(ConnectionError):
            for _ in range(200):
                connection.sendall(more)
                time.sleep(0.001)
        raw = read_all(connection)
    assert statuses(raw) == [431]
    assert json.loads(raw.partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"


@pytest.mark.parametrize("headers", [{f"x-{number}": "y" for number in range(101)}, {"x": "y" * 40_000}])
def test_large_head(service: Service, headers: dict[str, str]) -> None:
    """A request with too many or too large headers is rejected."""
    response = service.http.get("/health", headers=headers)
    assert_error(response, 431, "headers_too_large")


def test_usual_heads_are_accepted(service: Service) -> None:
    """The headers that proxies and browsers add are accepted."""
    headers = {f"x-{number}": "y" * 300 for number in range(80)}
    assert service.http.get("/health", headers=headers).status_code == 200


FEW_FILES = """import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 120))
os.execv(sys.executable, [sys.executable, "-m", "emb_model_provider.main"])"""


def test_connections_over_the_limit_wait(tmp_path: Path) -> None:
    """The limit of open files is raised as far as possible. Connections beyond it are answered after others are closed."""
    command = [sys.executable, "-c", FEW_FILES]
    with Service(tmp_path, command=command, PRELOAD_MODELS="none") as few, ExitStack() as stack:
        few.wait("/health")
        few.http.close()  # its connection counts
        files = Path(f"/proc/{few.process.pid}/limits")
        if files.exists():
            assert re.search(r"Max open files +120 +120 ", files.read_text())
        clients = [stack.enter_context(connect(few)) for _ in range(150)]
        for client in clients:
            client.sendall(HEALTH)
        accepted = clients[:60]
        for client in accepted:
            assert statuses(client.recv(65536)) == [200]
        wait_until(lambda: "60 connections are open" in few.log_text())
        for _ in range(50):  # long enough for answers to the others
            accepted[0].sendall(HEALTH)
            assert statuses(accepted[0].recv(65536)) == [200]
        assert select.select(clients[60:], [], [], 0)[0] == []
        for closing, waiting in zip(clients[:-60], clients[60:], strict=True):
            closing.close()
            assert statuses(waiting.recv(65536)) == [200]
        stack.close()
        wait_until(lambda: httpx.get(f"{few.url}/health", trust_env=False, timeout=60).status_code == 200)
    assert 1 <= few.log_text().count("60 connections are open") < 10


@pytest.mark.slow
def test_more_clients_than_the_limit_of_connections_at_once(service: Service) -> None:
    """As Open WebUI sends a long document: one connection for each of its parts, all at the same time."""
    count = 5000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count + 100:
        pytest.skip(f"this process may open only {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 100), hard))
    body = b'{"input": "x", "encoding_format": "base64"}'
    request = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    async def send() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(request)
        answer = await reader.read()
        writer.close()
        return answer

    async def send_all() -> list[bytes]:
        return await asyncio.gather(*(send() for _ in range(count)))

    try:
        answers = asyncio.run(send_all())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [statuses(answer) for answer in answers] == [[200]] * count


# --- memory of all requests together ------------------------------------------------------------------

KEY = f"Authorization: Bearer {KEYS[0]}\r\n".encode()
PART = b'{"input": "' + b"x" * 240_000
"""Eight of these are nearly as much as the body budget of `guarded`: 8 x 250 kB."""


@contextmanager
def filled(guarded: Service) -> Iterator[None]:
    """Use nearly the whole body budget of the service with incomplete requests."""
    with ExitStack() as stack:

        def hold() -> socket.socket:
            connection = stack.enter_context(connect(guarded))
            connection.sendall(POST + KEY + b"Content-Length: 250000\r\n\r\n" + PART)
            return connection

        holding = [hold() for _ in range(8)]

        def is_full() -> bool:
            # The probe itself can cause the rejection of one of them.
            rejected, _, _ = select.select(holding, [], [], 0.1)
            holding[:] = [connection for connection in holding if connection not in rejected]
            holding.extend(hold() for _ in rejected)
            return not rejected and probe(guarded).status_code == 429

        wait_until(is_full)
        yield
    wait_until(lambda: probe(guarded).status_code == 200)


def probe(guarded: Service) -> httpx.Response:
    """Send a large body with a short input."""
    return guarded.http.post("/v1/embeddings", content=json.dumps({"input": "x", "user": "y" * 200_000}))


def test_body_budget(guarded: Service) -> None:
    """A body that exceeds the budget is rejected at once, announced or not, and small requests are answered."""
    with filled(guarded):
        response = probe(guarded)
        assert_error(response, 429, "queue_full", type="rate_limit_error", phrase="2.0 MB")
        assert 1 <= int(response.headers["retry-after"]) <= 120

        def pieces() -> Iterator[bytes]:
            yield b'{"input": "x", "user": "'
            for _ in range(24):
                yield b"y" * 10_000

        chunked = guarded.http.post("/v1/embeddings", content=pieces())
        assert chunked.request.headers["transfer-encoding"] == "chunked"
        assert_error(chunked, 429, "queue_full", type="rate_limit_error")
        assert guarded.embed("small").status_code == 200


def test_body_budget_is_released(guarded: Service) -> None:
    """Requests that fail, are rejected or are disconnected release their share of the budget."""

    def too_long() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 10_000

    for _ in range(12):
        assert guarded.http.post("/v1/embeddings", content=too_long()).status_code == 413
        assert guarded.post(b" " * 250_000).status_code == 400
        with connect(guarded) as connection:
            connection.sendall(POST + KEY + b"Content-Length: 250000\r\n\r\n" + PART)
    wait_until(lambda: probe(guarded).status_code == 200)


class FakeConnection:
    """A connection whose client does not read."""

    def __init__(self, unsent: int) -> None:
        self.unsent = unsent
        self.aborted = False

    def unsent_bytes(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.aborted = True


def test_unread_responses_are_limited() -> None:
    """If unread responses exceed the limit, clients that have not read for longest are disconnected, except the last."""
    limiter = ConnectionLimiter(LimitSettings(max_body_mb=100 / 1000**2, max_pending_body_mb=100 / 1000**2))
    first, second, third, fast, huge = (FakeConnection(unsent) for unsent in (40, 40, 30, 500, 1000))
    limiter.on_paused(fast)
    limiter.on_resumed(fast)
    limiter.on_paused(first)
    limiter.on_paused(second)
    assert not first.aborted
    limiter.on_paused(third)
    assert [each.aborted for each in (first, second, third)] == [True, False, False]
    limiter.on_paused(huge)
    assert [each.aborted for each in (second, third, huge, fast)] == [True, True, False, False]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports a closed connection before its data is read")
def test_client_that_leaves_behind_pipelined_requests_is_noticed(service: Service) -> None:
    """Its work is dropped, although a second request was sent and is not read yet."""
    body = json.dumps({"input": MANY_TEXTS}).encode()
    request = POST + b"X-Request-Id: pipelined-%d\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    with connect(service) as connection:
        connection.sendall(request % 1 + request % 2)
        wait_until(lambda: service.figure("emb_provider_queue_tokens"))
    assert [line["status"] for line in service.logged(request_id="pipelined-1")] == [499]
    wait_until(lambda: service.figure("emb_provider_queue_tokens") == 0)
