"""Soak test: mixed load and injected failures for a long time. The vectors of all responses are compared.

The service runs with the supervisor. Failures are injected as in tests/faults.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import QUICK_HELP, ROOT
from benchmarks.contenders import SERVICE_CACHE, Contender, Server, stop_servers_on_sigterm
from benchmarks.report import describe_run, format_number, log_progress, markdown_table
from benchmarks.resources import MemoryLog
from benchmarks.soak_client import Client
from benchmarks.soak_faults import WATCHDOG_S, FaultInjector
from benchmarks.soak_requests import (
    EMBEDDINGS,
    FAILING,
    GET,
    INVALID,
    MAX_REQUEST_TOKENS,
    MIN_COSINE,
    MISBEHAVING,
    VALID,
    RequestFactory,
    make_pool,
    parse_vectors,
)
from benchmarks.soak_sender import RESPONSE_TIMEOUT_S, RequestSender
from emb_model_provider.model_spec import BUNDLED_MODEL
from tests.faults.planted import Control

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.soak_requests import Pool, Request

_MAX_IN_PROGRESS = 300
_BURST, _BURST_INTERVAL_S = 40, 15.0
_PROCESS_ENDS_SHARE = 0.4
"""Share of the time in which the process is ended. Memory is measured within the process that serves afterwards."""
_SETTLED_AFTER_S = 120.0
_MODELS = {"first": {"name": BUNDLED_MODEL}, "second": {"name": BUNDLED_MODEL, "precision": "fp32", "pooling": "cls"}}
"""The models use different pooling, so that a response of the wrong model is a wrong response."""
_QUICK_MODELS = {"first": {"name": BUNDLED_MODEL}, "second": {"name": BUNDLED_MODEL, "dimensions": [128]}}


class SoakTest:
    """One run against one service."""

    def __init__(self, server: Server, control: Control, pool: Pool, models: Sequence[str], seed: int) -> None:
        self._client = Client(server.port, timeout_s=RESPONSE_TIMEOUT_S)
        self._random = random.Random(seed)  # noqa: S311 - repeatable on purpose
        self._pool = pool
        self._control = control
        self._requests = RequestFactory(pool, models, self._random)
        self._in_progress: set[asyncio.Task[None]] = set()
        self.sender = RequestSender(self._client, pool)
        faults = random.Random(seed + 1)  # noqa: S311 - likewise
        self.injector = FaultInjector(control, self.sender, self._requests, faults, server.pid)
        self.memory = MemoryLog(self.injector.service_pid)
        self.rate = 0.0
        """Requests per second."""
        self.elapsed_s = 0.0

    async def run(self, seconds: float, *, load: float, pause_s: float) -> None:
        """Compute the references, measure the throughput, and send requests at a share of it.

        Args:
            seconds: Duration of the load.
            load: This share.
            pause_s: Mean pause between two injected failures, in seconds.
        """
        await self._compute_references()
        throughput = await self._measure_throughput(min(10.0, seconds / 8))
        self.rate = load * throughput
        log_progress(f"throughput {throughput:.0f} requests/s; sending {self.rate:.0f}/s")
        sampling = asyncio.create_task(self.memory.run())
        started = time.monotonic()
        injecting = asyncio.create_task(
            self.injector.run(
                process_ends_until=started + _PROCESS_ENDS_SHARE * seconds, until=started + seconds, pause_s=pause_s
            )
        )
        await self._send_load(started + seconds, injecting)
        tally = self.sender.tally
        try:
            await injecting
        except RuntimeError as error:
            tally.fail(f"injecting failures ended: {error}")
        self.elapsed_s = time.monotonic() - started
        if self._in_progress:
            await asyncio.wait(self._in_progress)
        sampling.cancel()
        for _ in range(10):
            await self.sender.send(self._requests.draw({"short": 1.0}))
        if (await self._client.request("GET", "/ready")).status != 200:
            tally.fail("the service is not ready at the end")
        self._client.close()

    async def _compute_references(self) -> None:
        """Request the vector of each text alone, without other load and without failures."""
        for model in self._requests.models:
            self._control.arm("calm", model)
            vectors = []
            for text in self._pool.texts:
                body = json.dumps({"model": model, "input": text}).encode()
                response = await self._client.request("POST", EMBEDDINGS, body)
                if response.status != 200:
                    raise RuntimeError(f"A reference could not be computed: {response.status} {response.body[:200]!r}")
                vectors.append(parse_vectors(response)[0])
            self._control.disarm("calm", model)
            self._pool.vectors[model] = np.stack(vectors)
            count = self._pool.remove_similar(self._pool.vectors[model])
            log_progress(f"references of {model}: {count} texts")

    async def _measure_throughput(self, seconds: float) -> float:
        """Return the requests per second of a closed loop with 8 connections."""
        deadline, done = time.monotonic() + seconds, 0

        async def client() -> None:
            nonlocal done
            while time.monotonic() < deadline:
                await self.sender.send(self._requests.draw(VALID))
                done += 1

        await asyncio.gather(*(client() for _ in range(8)))
        return done / seconds

    async def _send_load(self, until: float, injecting: asyncio.Task[None]) -> None:
        weights = VALID | INVALID | GET | MISBEHAVING | FAILING
        due = time.monotonic()
        next_burst = due + _BURST_INTERVAL_S / 2
        while due < until and not (injecting.done() and injecting.exception()):
            due += self._random.expovariate(self.rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            count = 1
            if due > next_burst:
                count, next_burst = _BURST, due + _BURST_INTERVAL_S
            for _ in range(min(count, _MAX_IN_PROGRESS - len(self._in_progress))):
                self._start(self._requests.draw(weights))

    def _start(self, request: Request) -> None:
        task = asyncio.create_task(self.sender.send(request))
        self._in_progress.add(task)
        task.add_done_callback(self._in_progress.discard)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_options(arguments)
    stop_servers_on_sigterm()
    models = _QUICK_MODELS if options.quick else _MODELS
    seconds, pause_s, texts = (4.0, 0.5, 20) if options.quick else (60.0 * options.minutes, 3.0, 400)
    with tempfile.TemporaryDirectory(prefix="benchmarks-soak-") as directory:
        scratch = Path(directory)
        control = Control(scratch / "faults")
        log_progress("starting the service; its first start compiles the models")
        with Server(_contender(models, scratch / "faults"), scratch) as server:
            server.wait()
            soak = SoakTest(server, control, make_pool(texts, options.seed), list(models), options.seed)
            asyncio.run(soak.run(seconds, load=options.load, pause_s=pause_s))
        print(_report(soak, control, options.load))
    tally = soak.sender.tally
    return 1 if tally.wrong or tally.lost or tally.unexpected else 0


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="duration of the load (default: %(default)g)")
    parser.add_argument("--load", type=float, default=0.65,
                        help="share of the measured throughput (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    return parser.parse_args(arguments)


def _contender(models: dict[str, dict[str, str]], faults: Path) -> Contender:
    settings = {
        "HOST": "127.0.0.1",
        "PORT": "{port}",
        "CACHE_DIR": str(SERVICE_CACHE),
        "MODEL_MAPPING": json.dumps(models),
        "SUPERVISE": "true",
        "WATCHDOG_S": f"{WATCHDOG_S:g}",
        "MAX_REQUEST_TOKENS": str(MAX_REQUEST_TOKENS),
        "RESULT_CACHE_MB": "0",  # an input that is to fail must be computed
        "TORCH_WHILE_COMPILING": "false",  # the process of torch has no planted failures, and compiling takes the processors
    }
    environment = {f"EMB_PROVIDER_{name}": value for name, value in settings.items()}
    environment |= {"FAULTS_DIR": str(faults), "PYTHONPATH": str(ROOT)}
    return Contender("soak", (sys.executable, "-m", "tests.faults.service"), environment, "/ready")


def _report(soak: SoakTest, control: Control, load: float) -> str:
    tally, memory = soak.sender.tally, soak.memory.summarize_last(_SETTLED_AFTER_S)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    generator_cores = (usage.ru_utime + usage.ru_stime) / soak.elapsed_s
    notes = [
        f"The service with the supervisor and two models; {format_number(soak.rate)} requests per second at random times, "
        f"{load:.0%} of the measured throughput, and bursts of {_BURST}; the load generator used "
        f"{format_number(generator_cores)} cores",
        f"Every vector is compared with the vector of its text, which the same service computed before, alone: cosine above "
        f"{MIN_COSINE}",
        "A request is repeated after 429, after 503 while its model is reloaded, after 504 if the queue of its model was full "
        "meanwhile, and if its connection broke while the process was replaced",
        f"The process is ended only in the first {_PROCESS_ENDS_SHARE:.0%} of the time",
    ]
    loads = control.events("load")
    processes = {event["pid"] for event in loads}
    first_loads = {(event["pid"], event["alias"]) for event in loads}
    result = [
        ["minutes", format_number(soak.elapsed_s / 60)],
        ["requests", f"{tally.requests:,}"],
        ["expected responses", f"{tally.expected:,}"],
        ["aborted by the client", f"{tally.aborted:,}"],
        ["**wrong responses**", f"{tally.wrong:,}"],
        ["**lost responses**", f"{tally.lost:,}"],
        ["**unexpected statuses**", f"{tally.unexpected:,}"],
        *([f"repeated: {reason}", f"{count:,}"] for reason, count in sorted(tally.repeated.items())),
        ["service processes", f"{len(processes):,}"],
        ["models reloaded within a process", f"{len(loads) - len(first_loads):,}"],
    ]
    # A batch that is bisected counts once for each of its parts.
    failed_passes = Counter(f"failed forward pass: {event['kind']}" for event in control.events("fault"))
    resident = [
        [f"{format_number(memory.settled_after_s)} s after its start", format_number(memory.settled)],
        ["at the end", format_number(memory.end)],
        ["highest", format_number(memory.highest)],
        ["highest of any process", format_number(soak.memory.highest())],
        ["**end ÷ after its start**", f"{memory.ratio:.2f}"],
    ]
    parts = [
        "# Soak test",
        describe_run("benchmarks.soak", notes),
        "## Result",
        markdown_table(["", "count"], result),
        "## Responses by status",
        _count_table(["Status", "responses"], {str(status): n for status, n in tally.statuses.items()}),
        "## Injected failures",
        _count_table(["Failure", "count"], soak.injector.injected + failed_passes),
        "## Requests by kind",
        _count_table(["Kind", "requests"], tally.kinds),
        "## Resident memory",
        f"Of the process that served the last {format_number(memory.lifetime_s / 60)} minutes:",
        markdown_table(["", "MiB"], resident),
        f"In ten equal parts of that time: {', '.join(map(format_number, memory.course))}.",
    ]
    if tally.examples:
        parts += ["## Errors", "\n".join(f"- {line}" for line in tally.examples)]
    return "\n\n".join(parts)


def _count_table(head: Sequence[str], counts: dict[str, int]) -> str:
    return markdown_table(head, [[name, f"{count:,}"] for name, count in sorted(counts.items())])


if __name__ == "__main__":
    sys.exit(main())
