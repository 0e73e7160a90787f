"""How soon a crashed service answers again, and what its callers notice. `python -m benchmarks.restart --help`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.contenders import Server, contender, stop_servers_on_sigterm
from benchmarks.machine import machine_lines
from benchmarks.progress import say
from benchmarks.resources import process_tree
from benchmarks.table import number, spread, table
from benchmarks.texts import Corpus
from benchmarks.workloads import body

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from benchmarks.contenders import Contender

SUPERVISED, POLICY = "supervisor", "restart policy"
_LOOP = """
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
"""What a container engine or systemd does, without the time that they take for it."""
_SAME = 0.999
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of the stream, over a connection of its own. Times in seconds, of one clock."""

    sent: float
    ended: float
    outcome: str
    """`right`, `wrong`, or what went wrong."""


@dataclass(slots=True)
class Crash:
    """One crash, and the stream of requests around it."""

    at: float = 0.0
    asked: list[Asked] = field(default_factory=list)
    supervisor_mib: float = 0.0

    @property
    def later(self) -> list[Asked]:
        """What was sent after the crash."""
        return [one for one in self.asked if one.sent >= self.at]

    @property
    def in_flight(self) -> list[Asked]:
        """What the process had before it at the crash."""
        return [one for one in self.asked if one.sent < self.at < one.ended]

    @property
    def back_s(self) -> float:
        """From the signal to the next right answer."""
        return min((one.ended for one in self.later if one.outcome == "right"), default=np.inf) - self.at

    @property
    def longest_s(self) -> float:
        return max((one.ended - one.sent for one in self.later if one.outcome == "right"), default=np.inf)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    stop_servers_on_sigterm()
    rounds, lead_s = (1, 0.2) if options.quick else (options.rounds, 2.0)
    contenders = _contenders()
    if options.quick:
        del contenders[POLICY]
    crashes: dict[str, list[Crash]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory(prefix="benchmarks-restart-") as directory:
        scratch, text = Path(directory), body(Corpus().texts("short", 1), "float")
        for turn in range(rounds):
            names = list(contenders)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                crash = _round(contenders[name], scratch, text, options.rate, lead_s)
                crashes[name].append(crash)
                say(
                    f"round {turn + 1}/{rounds}: {name}: back after {crash.back_s:.2f} s, {_failures(crash.later)}"
                )
    print(_report(crashes, rounds, options.rate))
    later = [one for crash in crashes[SUPERVISED] for one in crash.later]
    return 1 if any(one.outcome != "right" for one in later) or not later else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restart", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rate", type=float, default=20.0,
                        help="requests a second, each over a new connection (default: %(default)g)")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="tiny: does everything work? Its figures mean nothing")  # fmt: skip
    return parser.parse_args(arguments)


def _contenders() -> dict[str, Contender]:
    ours = contender("ours")
    supervised = {**ours.environment, "EMB_PROVIDER_SUPERVISE": "true"}
    return {
        SUPERVISED: replace(ours, environment=supervised),
        POLICY: replace(ours, command=(sys.executable, "-c", _LOOP)),
    }


def _round(one: Contender, scratch: Path, text: str, rate: float, lead_s: float) -> Crash:
    with Server(one, scratch) as server:
        server.wait(600.0)
        _, answer = server.post(text)
        return asyncio.run(_crash(server, text, _vector(answer), rate, lead_s))


async def _crash(
    server: Server, text: str, expected: NDArray[np.float32], rate: float, lead_s: float
) -> Crash:
    """Crash the service in the middle of a steady stream of requests, which ends a while after it has come back."""
    crash = Crash()
    asking: set[asyncio.Task[None]] = set()
    back = asyncio.Event()

    async def ask() -> None:
        sent = time.perf_counter()
        try:
            outcome = await asyncio.wait_for(_ask(server.port, text, expected), _TIMEOUT_S)
        except (OSError, ValueError, KeyError) as error:
            outcome = type(error).__name__
        crash.asked.append(Asked(sent, time.perf_counter(), outcome))
        if crash.at and sent >= crash.at and outcome == "right":
            back.set()

    async def stream() -> None:
        due = time.perf_counter()
        while True:
            task = asyncio.create_task(ask())
            asking.add(task)
            task.add_done_callback(asking.discard)
            due += 1 / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))

    streaming = asyncio.create_task(stream())
    try:
        await asyncio.sleep(lead_s)
        child = process_tree(server.pid)[1]
        crash.supervisor_mib = _resident_mib(server.pid)
        crash.at = time.perf_counter()
        os.kill(child, signal.SIGSEGV)
        await asyncio.wait_for(back.wait(), _TIMEOUT_S)
        await asyncio.sleep(lead_s)
    finally:
        streaming.cancel()
        await asyncio.gather(*asking, streaming, return_exceptions=True)
    return crash


async def _ask(port: int, text: str, expected: NDArray[np.float32]) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        content = text.encode()
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        answer = await reader.read()
    finally:
        writer.close()
    head_bytes, _, payload = answer.partition(b"\r\n\r\n")
    if not head_bytes:
        return "closed unanswered"
    if not head_bytes.startswith(b"HTTP/1.1 200 "):
        return head_bytes.split(b"\r\n", 1)[0].decode()
    return "right" if float(_vector(payload) @ expected) > _SAME else "wrong"


def _vector(answer: bytes) -> NDArray[np.float32]:
    return np.asarray(json.loads(answer)["data"][0]["embedding"], dtype=np.float32)


def _resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) / 1024


def _failures(asked: Sequence[Asked]) -> str:
    found = Counter(one.outcome for one in asked if one.outcome != "right")
    return ", ".join(f"{count} {what}" for what, count in found.most_common()) or "0 failed"


def _report(crashes: dict[str, list[Crash]], rounds: int, rate: float) -> str:
    notes = [
        f"{rounds} round(s), each with a new service; SIGSEGV to the process that serves; {rate:g} requests a second, "
        "each over a new connection, a short text whose vector is compared",
        f"`{SUPERVISED}`: EMB_PROVIDER_SUPERVISE=true, {number(_median_mib(crashes))} MiB resident; `{POLICY}`: the "
        "service is started again as soon as it has ended, by a loop that does nothing else",
    ]
    rows = [
        [
            name,
            spread([crash.back_s for crash in found]),
            spread([crash.longest_s for crash in found]),
            str(sum(len(crash.asked) for crash in found)),
            str(sum(len([one for one in crash.in_flight if one.outcome != "right"]) for crash in found)),
            str(sum(len(crash.later) for crash in found)),
            _failures([one for crash in found for one in crash.later]),
        ]
        for name, found in crashes.items()
    ]
    head = [
        "Started again by", "to the next right answer, s", "longest wait, s", "requests",
        "lost in flight", "sent after the crash", "of these failed",
    ]  # fmt: skip
    return "\n\n".join(
        [
            "# Coming back",
            "\n".join(machine_lines("benchmarks.restart", notes)),
            "## After a crash\n\nMedian of the rounds (lowest–highest); counts over all rounds.",
            table(head, rows),
        ]
    )


def _median_mib(crashes: dict[str, list[Crash]]) -> float:
    return float(np.median([crash.supervisor_mib for crash in crashes[SUPERVISED]]))


if __name__ == "__main__":
    sys.exit(main())
