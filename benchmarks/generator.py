"""A load generator that runs in its own process: one thread, prepared requests, only the standard library.

It reads a job as JSON from stdin and writes the result as JSON to stdout. There are two modes:

- closed loop: each connection sends its next request after a response. The generator waits for the requests that are in
  progress at the end and counts them, so that slow responses are not lost.
- open loop: requests are sent at times that are drawn in advance (Poisson), independently of the responses. Latency is
  measured from the time at which a request was due, so that it includes the delay of a server that falls behind.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import select
import socket
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MAX_IDLE_S = 2.0
"""Connections that were idle for longer are replaced, because some servers close them after five seconds."""


@dataclass(slots=True, eq=False)
class Connection:
    """A connection and the response that it receives."""

    socket: socket.socket
    due: float = 0.0
    """When the request was due."""
    idle_since: float = 0.0
    buffer: bytearray = field(default_factory=bytearray)
    expected: int = 0
    """Bytes of the whole response; 0 until its head has been received."""


class LoadGenerator:
    """One run against one server."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._address = (job["host"], job["port"])
        self._seconds = float(job["seconds"])
        self._timeout = float(job["timeout_s"])
        self._closed = job["mode"] == "closed"
        self._connections = int(job["connections"])
        self._requests = _prepare_requests(job)
        self._sent = 0
        self._busy: dict[int, Connection] = {}
        """By file descriptor."""
        self._idle: list[Connection] = []
        self._waiting: deque[float] = deque()
        """Due times of the requests that wait for a connection."""
        self._arrivals = deque() if self._closed else _draw_arrivals(job["rate"], self._seconds, job["seed"])
        self._latencies: list[float] = []
        self._errors: Counter[str] = Counter()
        self._end = self._last_response = 0.0

    def run(self) -> dict[str, Any]:
        """Send requests, wait for the last responses, and return the result."""
        self._idle = [connection for _ in range(self._connections) if (connection := self._connect())]
        cpu_started, start = time.process_time(), time.perf_counter()
        self._end = self._last_response = start + self._seconds
        deadline = self._end + self._timeout
        self._arrivals = deque(start + offset for offset in self._arrivals)
        if self._closed:
            self._waiting.extend([start] * len(self._idle))
        while True:
            now = time.perf_counter()
            while self._arrivals and self._arrivals[0] <= now:
                self._waiting.append(self._arrivals.popleft())
            while self._waiting and self._idle:
                self._send(self._idle.pop(), self._waiting.popleft(), now)
            if not (self._busy or self._arrivals or self._waiting):
                break
            if now > deadline or not (self._busy or self._idle):
                self._errors["timeout"] += len(self._busy) + len(self._waiting)
                self._last_response = now
                break
            # select has a resolution of microseconds, epoll of milliseconds, which is too coarse for arrivals.
            until = self._arrivals[0] if self._arrivals else deadline
            for descriptor in select.select(list(self._busy), [], [], max(0.0, until - now))[0]:
                self._receive(self._busy[descriptor])
        end = self._last_response if self._closed else max(self._last_response, self._end)
        return {
            "ok": len(self._latencies),
            "errors": dict(self._errors),
            "elapsed_s": end - start,
            "latency_ms": _percentiles(self._latencies),
            "repeated": max(0, self._sent - len(self._requests)),
            "cpu_s": time.process_time() - cpu_started,
        }

    def _connect(self) -> Connection | None:
        try:
            opened = socket.create_connection(self._address, timeout=self._timeout)
        except OSError:
            self._errors["connect"] += 1
            return None
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Connection(opened, idle_since=time.perf_counter())

    def _send(self, connection: Connection, due: float, now: float) -> None:
        if now - connection.idle_since > _MAX_IDLE_S:
            connection.socket.close()
            new = self._connect()
            if new is None:
                return
            connection = new
        connection.due = due
        connection.expected = 0
        connection.buffer.clear()
        self._busy[connection.socket.fileno()] = connection
        try:
            connection.socket.sendall(self._requests[self._sent % len(self._requests)])
        except OSError:
            self._on_broken(connection)
        self._sent += 1

    def _receive(self, connection: Connection) -> None:
        try:
            received = connection.socket.recv(262_144)
        except OSError:
            received = b""
        if not received:
            self._on_broken(connection)
            return
        buffer = connection.buffer
        buffer += received
        if not connection.expected:
            head = buffer.find(b"\r\n\r\n")
            if head < 0:
                return
            length = _content_length(bytes(buffer[:head]))
            if length is None:
                self._on_broken(connection)
                return
            connection.expected = head + 4 + length
        if len(buffer) >= connection.expected:
            self._on_response(connection, status=bytes(buffer[9:12]).decode("ascii", "replace"))

    def _on_response(self, connection: Connection, status: str) -> None:
        now = time.perf_counter()
        del self._busy[connection.socket.fileno()]
        if status == "200":
            self._latencies.append(now - connection.due)
        else:
            self._errors[status] += 1
        self._on_idle(connection, now)

    def _on_broken(self, connection: Connection) -> None:
        """Count a connection that ended without a response, and replace it."""
        now = time.perf_counter()
        self._errors["broken"] += 1
        self._busy.pop(connection.socket.fileno(), None)
        connection.socket.close()
        if new := self._connect():
            self._on_idle(new, now)

    def _on_idle(self, connection: Connection, now: float) -> None:
        self._last_response = now
        connection.idle_since = now
        self._idle.append(connection)
        if self._closed and now < self._end:
            self._waiting.append(now)


def _prepare_requests(job: dict[str, Any]) -> list[bytes]:
    path = job.get("path", "/v1/embeddings")
    head = f"POST {path} HTTP/1.1\r\nHost: {job['host']}:{job['port']}\r\nContent-Type: application/json\r\n"
    bodies = Path(job["bodies"]).read_bytes().splitlines()
    return [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]


def _content_length(head: bytes) -> int | None:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    return None


def _draw_arrivals(rate: float, seconds: float, seed: int) -> deque[float]:
    gaps = random.Random(seed)  # noqa: S311 - arrival times are not secret
    times: deque[float] = deque()
    at = gaps.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += gaps.expovariate(rate)
    return times


def _percentiles(latencies: list[float]) -> dict[str, float]:
    """Return percentiles (nearest rank) and the mean, in milliseconds."""
    if not latencies:
        return {}
    ordered = sorted(latencies)
    percentiles = {
        name: 1000 * ordered[max(0, math.ceil(share * len(ordered)) - 1)]
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))
    }
    return percentiles | {"mean": 1000 * sum(ordered) / len(ordered)}


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(LoadGenerator(json.load(sys.stdin)).run()))
