"""Measures how long a crashed service takes to respond again, and which requests fail meanwhile."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import psutil

from benchmarks import QUICK_HELP
from benchmarks.contenders import Server, alternate, make_contender, stop_servers_on_sigterm
from benchmarks.reference import decode_vector
from benchmarks.report import describe_run, format_counts, format_number, format_spread, log_progress, markdown_table
from benchmarks.resources import resident_mib
from benchmarks.texts import Corpus
from benchmarks.workloads import request_body

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from benchmarks.contenders import Contender

SUPERVISOR, RESTART_POLICY = "supervisor", "restart policy"
CORRECT, WRONG = "correct", "wrong"
_RESTART_LOOP = """
import signal, subprocess, sys
process, stopping = None, False
def stop(number, frame):
    global stopping
    stopping = True
    if process is not None:
        process.send_signal(number)
signal.signal(signal.SIGTERM, stop)
while not stopping:
    process = subprocess.Popen([sys.executable, "-m", "emb_model_provider.main"])
    process.wait()
"""
"""Does what a container engine or systemd does, without the time that they need for it."""
_MIN_COSINE = 0.999
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Request:
    """A request over a new connection. Times are those of `time.perf_counter`."""

    sent: float
    ended: float
    outcome: str
    """`CORRECT`, `WRONG`, or the status or error."""

    @property
    def is_correct(self) -> bool:
        return self.outcome == CORRECT


@dataclass(slots=True)
class Crash:
    """One crash, and the requests before and after it."""

    at: float = 0.0
    requests: list[Request] = field(default_factory=list)
    supervisor_mib: float = 0.0

    @property
    def later(self) -> list[Request]:
        """Requests that were sent after the crash."""
        return [request for request in self.requests if request.sent >= self.at]

    @property
    def lost(self) -> list[Request]:
        """Requests that were in progress during the crash and failed."""
        return [
            request for request in self.requests if request.sent < self.at < request.ended and not request.is_correct
        ]

    @property
    def recovery_s(self) -> float:
        """Time from the crash to the next correct response."""
        return min((request.ended for request in self.later if request.is_correct), default=np.inf) - self.at

    @property
    def longest_wait_s(self) -> float:
        waits = (request.ended - request.sent for request in self.later if request.is_correct)
        return max(waits, default=np.inf)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_options(arguments)
    stop_servers_on_sigterm()
    rounds, lead_s = (1, 0.2) if options.quick else (options.rounds, 2.0)
    ours = make_contender("ours")
    contenders = {
        SUPERVISOR: replace(ours, environment={**ours.environment, "EMB_PROVIDER_SUPERVISE": "true"}),
        RESTART_POLICY: replace(ours, command=(sys.executable, "-c", _RESTART_LOOP)),
    }
    if options.quick:
        del contenders[RESTART_POLICY]
    crashes: dict[str, list[Crash]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory(prefix="benchmarks-restart-") as directory:
        scratch, body = Path(directory), request_body(Corpus().texts("short", 1), "float")
        for number in range(rounds):
            for name in alternate(list(contenders), number):
                crash = _run_round(contenders[name], scratch, body, options.rate, lead_s)
                crashes[name].append(crash)
                log_progress(
                    f"round {number + 1}/{rounds}: {name}: next correct response after {crash.recovery_s:.2f} s, "
                    f"{_failures(crash.later)}"
                )
    print(_report(crashes, rounds, options.rate))
    later = [request for crash in crashes[SUPERVISOR] for request in crash.later]
    return 0 if later and all(request.is_correct for request in later) else 1


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restart", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument("--rate", type=float, default=20.0,
                        help="requests per second, each over a new connection (default: %(default)g)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    return parser.parse_args(arguments)


def _run_round(contender: Contender, scratch: Path, body: str, rate: float, lead_s: float) -> Crash:
    with Server(contender, scratch) as server:
        server.wait()
        _, response = server.post(body)
        return asyncio.run(_crash(server, body, _parse_vector(response), rate, lead_s))


async def _crash(server: Server, body: str, expected: NDArray[np.float32], rate: float, lead_s: float) -> Crash:
    """Crash the service while requests are sent at a steady rate, until it responds again and `lead_s` longer."""
    crash = Crash()
    sending: set[asyncio.Task[None]] = set()
    recovered = asyncio.Event()

    async def send() -> None:
        sent = time.perf_counter()
        try:
            outcome = await asyncio.wait_for(_send(server.port, body, expected), _TIMEOUT_S)
        except (OSError, ValueError, KeyError) as error:
            outcome = type(error).__name__
        request = Request(sent, time.perf_counter(), outcome)
        crash.requests.append(request)
        if crash.at and sent >= crash.at and request.is_correct:
            recovered.set()

    async def send_steadily() -> None:
        due = time.perf_counter()
        while True:
            task = asyncio.create_task(send())
            sending.add(task)
            task.add_done_callback(sending.discard)
            due += 1 / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))

    load = asyncio.create_task(send_steadily())
    try:
        await asyncio.sleep(lead_s)
        service = psutil.Process(server.pid).children()[0]
        crash.supervisor_mib = resident_mib(server.pid)
        crash.at = time.perf_counter()
        service.send_signal(signal.SIGSEGV)
        await asyncio.wait_for(recovered.wait(), _TIMEOUT_S)
        await asyncio.sleep(lead_s)
    finally:
        load.cancel()
        await asyncio.gather(*sending, load, return_exceptions=True)
    return crash


async def _send(port: int, body: str, expected: NDArray[np.float32]) -> str:
    """Send a request over a new connection, and return its outcome."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        content = body.encode()
        head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        response = await reader.read()
    finally:
        writer.close()
    response_head, _, response_body = response.partition(b"\r\n\r\n")
    if not response_head:
        return "closed without a response"
    if not response_head.startswith(b"HTTP/1.1 200 "):
        return response_head.split(b"\r\n", 1)[0].decode()
    return CORRECT if float(_parse_vector(response_body) @ expected) > _MIN_COSINE else WRONG


def _parse_vector(response: bytes) -> NDArray[np.float32]:
    return decode_vector(json.loads(response)["data"][0]["embedding"])


def _failures(requests: Iterable[Request]) -> str:
    outcomes = Counter(request.outcome for request in requests if not request.is_correct)
    return format_counts(outcomes) if outcomes else "0 failed"


def _report(crashes: dict[str, list[Crash]], rounds: int, rate: float) -> str:
    supervisor_mib = median(crash.supervisor_mib for crash in crashes[SUPERVISOR])
    notes = [
        f"{rounds} round(s), each with a new service; SIGSEGV to the process that serves; {rate:g} requests per second, each "
        "over a new connection, with a short text whose vector is compared",
        f"`{SUPERVISOR}`: EMB_PROVIDER_SUPERVISE=true, {format_number(supervisor_mib)} MiB resident; `{RESTART_POLICY}`: a "
        "loop that starts the service again as soon as it has ended",
    ]
    rows = [
        [
            name,
            format_spread([crash.recovery_s for crash in of_name]),
            format_spread([crash.longest_wait_s for crash in of_name]),
            str(sum(len(crash.requests) for crash in of_name)),
            str(sum(len(crash.lost) for crash in of_name)),
            str(sum(len(crash.later) for crash in of_name)),
            _failures(request for crash in of_name for request in crash.later),
        ]
        for name, of_name in crashes.items()
    ]
    head = [
        "restarted by", "to the next correct response, s", "longest wait, s", "requests",
        "lost in progress", "sent after the crash", "of these failed",
    ]  # fmt: skip
    return "\n\n".join(
        [
            "# Restarts",
            describe_run("benchmarks.restart", notes),
            "## After a crash\n\nMedian of the rounds (lowest–highest); counts over all rounds.",
            markdown_table(head, rows),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
