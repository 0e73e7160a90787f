"""Measures what browsers cost that show the console.

Throughput with viewers is compared with that without. The noise of a machine is larger than one percent, so the time of the
processors that an otherwise idle service needs for its viewers is measured, too.
"""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import QUICK_HELP
from benchmarks.contenders import Server, make_contender, stop_servers_on_sigterm
from benchmarks.load import closed_loop
from benchmarks.report import describe_run, format_number, format_spread, log_progress, markdown_table, ratios
from benchmarks.resources import cpu_time
from benchmarks.texts import Corpus
from benchmarks.workloads import write_bodies
from emb_model_provider.backends.hardware import usable_cpus

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_VIEWERS = (1, 5)
_CONNECTIONS = 8
_TIMEOUT_S = 60


@dataclass(slots=True)
class Measured:
    """Requests per second in each round, the events that each viewer received per second, and the load of the idle service."""

    rates: list[float] = field(default_factory=list)
    idle_shares: list[float] = field(default_factory=list)
    """CPU time of the service without requests, divided by that of all processors."""
    events: list[float] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_options(arguments)
    stop_servers_on_sigterm()
    rounds, seconds = (1, 2.0) if options.quick else (options.rounds, options.seconds)
    measured = {viewers: Measured() for viewers in (0, *_VIEWERS)}
    with tempfile.TemporaryDirectory() as directory:
        bodies = write_bodies(
            Path(directory) / "bodies", Corpus(), "short", 1, 2000 if options.quick else 40_000, "base64"
        )
        with Server(make_contender("ours"), Path(directory)) as server:
            server.wait()
            closed_loop(server, bodies, connections=_CONNECTIONS, seconds=seconds)
            for number in range(rounds):
                log_progress(f"round {number + 1} of {rounds}")
                # Alternately in both orders, because the speed of a machine drifts.
                for viewers in list(measured)[:: 1 if number % 2 == 0 else -1]:
                    with _watching(server, viewers) as received:
                        result = closed_loop(server, bodies, connections=_CONNECTIONS, seconds=seconds)
                        events = sum(received)
                        measured[viewers].idle_shares.append(_idle_share(server, seconds))
                    measured[viewers].rates.append(result.rate)
                    if viewers:
                        measured[viewers].events.append(events / viewers / result.elapsed_s)
                    if result.errors:
                        raise RuntimeError(f"requests failed: {result.errors}")
    print(_report(measured, seconds))
    return 0


def _idle_share(server: Server, seconds: float) -> float:
    """Return the CPU time that the service needs without requests, divided by that of all processors."""
    before, started = cpu_time(server.pid), time.monotonic()
    time.sleep(seconds)
    used = cpu_time(server.pid).since(before)
    return used.tree_s / (time.monotonic() - started) / usable_cpus()


@contextmanager
def _watching(server: Server, viewers: int) -> Iterator[list[int]]:
    """Let `viewers` browsers show the overview, and yield the number of events that each of them has received."""
    received = [0] * viewers
    connections = [socket.create_connection(("127.0.0.1", server.port), timeout=_TIMEOUT_S) for _ in range(viewers)]

    def read(number: int) -> None:
        connection = connections[number]
        connection.sendall(b"GET /console/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        # Each event ends with an empty line.
        while data := connection.recv(1 << 16):
            received[number] += data.count(b"\n\n")

    threads = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(viewers)]
    for thread in threads:
        thread.start()
    try:
        yield received
    finally:
        for connection in connections:
            connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for connection in connections:
            connection.close()


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.console", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    return parser.parse_args(arguments)


def _report(measured: dict[int, Measured], seconds: float) -> str:
    notes = [
        f"{_CONNECTIONS} connections, each with one short text per request; {seconds:g} s for each measurement",
        "The order of the measurements alternates from round to round, and the ratio is taken within a round",
        "The load is that of the service on all processors, in the same time without requests",
        "The readers of the events run on the same machine, and their work counts as well",
    ]
    head = ["viewers", "requests/s", "relative to none", "events/s for each viewer", "load of the idle service, %"]
    without = measured[0].rates
    rows = [
        [
            str(viewers) if viewers else "none",
            format_spread(each.rates),
            format_spread(ratios(each.rates, without)) if viewers else "1",
            format_number(sum(each.events) / len(each.events)) if each.events else "–",
            format_spread([100 * share for share in each.idle_shares]),
        ]
        for viewers, each in measured.items()
    ]
    return f"## Cost of the console\n\n{markdown_table(head, rows)}\n\n{describe_run('benchmarks.console', notes)}"


if __name__ == "__main__":
    sys.exit(main())
