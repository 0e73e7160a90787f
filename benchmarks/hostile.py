"""Measures what request bodies cost that are made to exhaust memory or to stop the event loop.

Each body is compared with a valid one of the same size, and with a request of one short text: how much the resident memory of
the service grows, and how long `GET /health` waits at most.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import QUICK_HELP
from benchmarks.contenders import Server, make_contender, stop_servers_on_sigterm
from benchmarks.report import (
    NONE,
    describe_run,
    format_counts,
    format_number,
    format_spread,
    log_progress,
    markdown_table,
    ratios,
)
from benchmarks.resources import resident_mib

if TYPE_CHECKING:
    from collections.abc import Sequence

_SIZE = 31_000_000
"""Bytes of a body. MAX_BODY_MB allows 32,000,000."""
_QUICK_SIZE = 2_000_000
_AT_ONCE = (1, 8)
_ORDINARY, _VALID = "one short text", "a valid body of this size"
_POLL_S = 0.002
_SETTLE_S = 0.3
"""Measured before and after the requests, too."""
_TIMEOUT_S = 300


@dataclass(slots=True)
class Measured:
    """The rounds of one body and one number of clients."""

    grown_mib: list[float] = field(default_factory=list)
    waits_ms: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)


def hostile_bodies(size: int) -> dict[str, bytes]:
    """Return bodies of about `size` bytes with more values, or longer ones, than any valid request."""

    def filled(pattern: str, before: str = '{"input": [', after: str = "0]}") -> bytes:
        return (before + pattern * (size // len(pattern)) + after).encode()

    return {
        "arrays": filled("[],"),
        "objects": filled('{"":1},'),
        "keys": b"{" + b",".join(b'"%d":0' % n for n in range(size // 11)) + b', "input": "x"}',
        "an ignored field": filled("{},", '{"input": "x", "user": [', "0]}"),
        "an invalid value": filled("[],", '{"input": "x", "model": [', "0]}"),
        "a syntax error at the end": filled("[],", after=""),
        "a long keyword": b'{"input": "x", "truncate": "' + "ŉ".encode() * (size // 2) + b'"}',
        "a long instruction": b'{"input": ["x", "y"], "instruction": "' + b"x" * size + b'"}',
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_options(arguments)
    stop_servers_on_sigterm()
    size, rounds = (_QUICK_SIZE, 1) if options.quick else (_SIZE, options.rounds)
    bodies = {
        _ORDINARY: json.dumps({"input": "How do I reset my password?"}).encode(),
        _VALID: json.dumps({"input": "word " * (size // 5)}).encode(),
        **hostile_bodies(size),
    }
    measured = {(name, clients): Measured() for clients in _AT_ONCE for name in bodies}
    with tempfile.TemporaryDirectory(prefix="benchmarks-hostile-") as directory:
        for number in range(rounds):
            log_progress(f"round {number + 1} of {rounds}")
            for (name, clients), each in measured.items():
                # A new process each time, because one that had a peak keeps some of its memory.
                with Server(make_contender("ours"), Path(directory)) as server:
                    server.wait()
                    server.post(bodies[_ORDINARY].decode())
                    _measure(server, bodies[name], clients, each)
    print(_report(measured, size, rounds))
    return 0


def _measure(server: Server, body: bytes, clients: int, measured: Measured) -> None:
    """Send a body from several clients at the same time, and watch the memory of the service and `/health` meanwhile."""
    ended = threading.Event()
    before = highest = resident_mib(server.pid)
    longest_s = 0.0

    def watch_memory() -> None:
        nonlocal highest
        while not ended.wait(_POLL_S):
            highest = max(highest, resident_mib(server.pid))

    def watch_health() -> None:
        nonlocal longest_s
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=_TIMEOUT_S)
        while not ended.wait(_POLL_S):
            started = time.perf_counter()
            connection.request("GET", "/health")
            connection.getresponse().read()
            longest_s = max(longest_s, time.perf_counter() - started)
        connection.close()

    def send(_: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=_TIMEOUT_S)
        try:
            connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
            return connection.getresponse().status
        finally:
            connection.close()

    watching = [threading.Thread(target=watch) for watch in (watch_memory, watch_health)]
    for thread in watching:
        thread.start()
    time.sleep(_SETTLE_S)
    with ThreadPoolExecutor(clients) as threads:
        measured.statuses.update(map(str, threads.map(send, range(clients))))
    time.sleep(_SETTLE_S)
    ended.set()
    for thread in watching:
        thread.join()
    measured.grown_mib.append(highest - before)
    measured.waits_ms.append(1000 * longest_s)


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    return parser.parse_args(arguments)


def _report(measured: dict[tuple[str, int], Measured], size: int, rounds: int) -> str:
    notes = [
        f"Bodies of {size / 1e6:g} MB, from one client and from {_AT_ONCE[-1]} at the same time; {rounds} rounds, each with a new process",
        f"Memory: the highest resident memory of the service during the requests, less that before them, sampled every "
        f"{1000 * _POLL_S:g} ms",
        f"/health: the longest of the requests for it that follow each other every {1000 * _POLL_S:g} ms",
        "Ratios are those to the valid body, with the same number of clients and in the same round",
        "The clients run on the same machine",
    ]
    head = ["Body", "clients", "memory, MiB", "÷ valid", "/health, ms", "÷ valid", "statuses"]
    rows = []
    for (name, clients), each in measured.items():
        valid = measured[_VALID, clients]
        is_compared = name not in (_ORDINARY, _VALID)
        rows.append(
            [
                name,
                str(clients),
                format_spread(each.grown_mib),
                format_spread(ratios(each.grown_mib, valid.grown_mib)) if is_compared else NONE,
                format_spread(each.waits_ms),
                format_spread(ratios(each.waits_ms, valid.waits_ms)) if is_compared else NONE,
                format_counts(each.statuses),
            ]
        )
    worst = max(max(each.waits_ms) for (name, _), each in measured.items() if name not in (_ORDINARY, _VALID))
    return "\n\n".join(
        [
            "# Hostile bodies",
            describe_run("benchmarks.hostile", notes),
            "## Memory and event loop",
            markdown_table(head, rows),
            f"The longest wait of /health beside a hostile body: {format_number(worst)} ms.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
