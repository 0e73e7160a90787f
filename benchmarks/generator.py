"""A load generator in a process of its own: one thread, prepared requests, only the standard library.

It reads a job as JSON from stdin and writes what it saw as JSON to stdout:

- closed loop: each connection sends its next request as soon as it is answered. Requests under way at the end are
  waited for and counted, so that slow ones are not lost.
- open loop: requests leave at times drawn beforehand (Poisson), whatever the server does. Latency counts from the
  time a request was due, so a server that falls behind cannot hide it.
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

_STALE_S = 2.0
"""An idle connection older than this is opened anew: some servers close theirs after five seconds."""


@dataclass(slots=True, eq=False)
class Connection:
    """A connection, and the answer it is waiting for."""

    socket: socket.socket
    due: float = 0.0
    idle_since: float = 0.0
    buffer: bytearray = field(default_factory=bytearray)
    expected: int = 0
    """Bytes of the whole response; 0 while its head has not been read."""


class Load:
    """One run against one server."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._address = (job["host"], job["port"])
        self._seconds = float(job["seconds"])
        self._timeout = float(job["timeout_s"])
        self._closed = job["mode"] == "closed"
        self._connections = int(job["connections"])
        self._requests = _requests(job)
        self._sent = 0
        self._busy: dict[int, Connection] = {}
        self._idle: list[Connection] = []
        self._waiting: deque[float] = deque()
        self._arrivals = deque() if self._closed else _arrivals(job["rate"], self._seconds, job["seed"])
        self._latencies: list[float] = []
        self._errors: Counter[str] = Counter()
        self._end = self._last = 0.0

    def run(self) -> dict[str, Any]:
        """Send, wait for what is under way, and return what was seen."""
        self._idle = [connection for _ in range(self._connections) if (connection := self._connect())]
        cpu, start = time.process_time(), time.perf_counter()
        self._end = self._last = start + self._seconds
        give_up = self._end + self._timeout
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
            if now > give_up or not (self._busy or self._idle):
                self._errors["timeout"] += len(self._busy) + len(self._waiting)
                self._last = now
                break
            # select knows microseconds, epoll only milliseconds: arrivals should be on time.
            until = self._arrivals[0] if self._arrivals else give_up
            for number in select.select(list(self._busy), [], [], max(0.0, until - now))[0]:
                self._receive(self._busy[number])
        elapsed = (self._last if self._closed else max(self._last, self._end)) - start
        return {
            "ok": len(self._latencies),
            "errors": dict(self._errors),
            "elapsed_s": elapsed,
            "latency_ms": _percentiles(self._latencies),
            "repeated": max(0, self._sent - len(self._requests)),
            "cpu_s": time.process_time() - cpu,
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
        if now - connection.idle_since > _STALE_S:
            connection.socket.close()
            fresh = self._connect()
            if fresh is None:
                return
            connection = fresh
        connection.due = due
        connection.expected = 0
        connection.buffer.clear()
        self._busy[connection.socket.fileno()] = connection
        try:
            connection.socket.sendall(self._requests[self._sent % len(self._requests)])
        except OSError:
            self._broken(connection)
        self._sent += 1

    def _receive(self, connection: Connection) -> None:
        try:
            received = connection.socket.recv(262_144)
        except OSError:
            received = b""
        if not received:
            self._broken(connection)
            return
        buffer = connection.buffer
        buffer += received
        if not connection.expected:
            head = buffer.find(b"\r\n\r\n")
            if head < 0:
                return
            length = _content_length(bytes(buffer[:head]))
            if length is None:
                self._broken(connection)
                return
            connection.expected = head + 4 + length
        if len(buffer) >= connection.expected:
            status = bytes(buffer[9:12]).decode("ascii", "replace")
            self._answered(connection, status)

    def _answered(self, connection: Connection, status: str) -> None:
        now = time.perf_counter()
        del self._busy[connection.socket.fileno()]
        if status == "200":
            self._latencies.append(now - connection.due)
        else:
            self._errors[status] += 1
        self._free(connection, now)

    def _broken(self, connection: Connection) -> None:
        """Count a connection that ended without an answer, and open another in its place."""
        now = time.perf_counter()
        self._errors["broken"] += 1
        self._busy.pop(connection.socket.fileno(), None)
        connection.socket.close()
        if fresh := self._connect():
            self._free(fresh, now)

    def _free(self, connection: Connection, now: float) -> None:
        self._last = now
        connection.idle_since = now
        self._idle.append(connection)
        if self._closed and now < self._end:
            self._waiting.append(now)


def _requests(job: dict[str, Any]) -> list[bytes]:
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: {job['host']}:{job['port']}\r\nContent-Type: application/json\r\n"
    bodies = Path(job["bodies"]).read_bytes().splitlines()
    return [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]


def _content_length(head: bytes) -> int | None:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    return None


def _arrivals(rate: float, seconds: float, seed: int) -> deque[float]:
    gaps = random.Random(seed)  # noqa: S311 - arrival times are no secret
    times: deque[float] = deque()
    at = gaps.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += gaps.expovariate(rate)
    return times


def _percentiles(latencies: list[float]) -> dict[str, float]:
    """Return percentiles in milliseconds, by nearest rank."""
    if not latencies:
        return {}
    ordered = sorted(latencies)
    found = {
        name: 1000 * ordered[max(0, math.ceil(share * len(ordered)) - 1)]
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))
    }
    found["mean"] = 1000 * sum(ordered) / len(ordered)
    return found


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(Load(json.load(sys.stdin)).run()))
