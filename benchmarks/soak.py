"""Does it keep serving? Mixed load, faults and deaths for as long as asked. `python -m benchmarks.soak --help`.

The real service under its supervisor, with faults planted as in tests/faults. Every answer is compared by value.
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
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.cache import ROOT
from benchmarks.contenders import SERVICE_CACHE, Contender, Server, stop_servers_on_sigterm
from benchmarks.progress import say
from benchmarks.soak_asking import ANSWER_WITHIN_S, Asker
from benchmarks.soak_client import Client
from benchmarks.soak_faults import WATCHDOG_S, Disturbances, MemoryLog, Planter
from benchmarks.soak_load import (
    EMBEDDINGS,
    FAULTY,
    LOOKING,
    MAX_REQUEST_TOKENS,
    MISBEHAVING,
    ORDINARY,
    REFUSED,
    Questions,
    make_pool,
    vectors_in,
)
from benchmarks.soak_report import report
from emb_model_provider.model_spec import BUNDLED_MODEL
from tests.faults.planted import Control

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.soak_load import ManifestKey, Pool
    from tests.faults.planted import Fault

_COMPILE_S = 900.0
_MOST_UNDER_WAY = 300
_BURST, _BURST_EVERY_S = 40, 15.0
_MODELS = {
    "first": {"name": BUNDLED_MODEL},
    "second": {"name": BUNDLED_MODEL, "precision": "fp32", "pooling": "cls"},
}
"""The second is pooled otherwise, so that an answer of the wrong model is a wrong answer."""
_QUICK_MODELS = {"first": {"name": BUNDLED_MODEL}, "second": {"name": BUNDLED_MODEL}}


class Soak:
    """One run against one service."""

    def __init__(
        self, server: Server, control: Control, pool: Pool, models: Sequence[str], seed: int
    ) -> None:
        self._client = Client(server.port, timeout_s=ANSWER_WITHIN_S)
        self._draw = random.Random(seed)  # noqa: S311 - drawn to be repeated
        self._pool = pool
        self._models = models
        self._questions = Questions(pool, models, self._draw)
        self._under_way: set[asyncio.Task[None]] = set()
        self._control = control
        disturbances = Disturbances()
        self.asker = Asker(self._client, pool, disturbances)
        faults = random.Random(seed + 1)  # noqa: S311 - likewise
        self.planter = Planter(
            control, self._client, models, faults, disturbances, ask=self._plant, supervisor=server.pid
        )
        self.memory = MemoryLog(self.planter.pid)
        self.capacity = 0.0
        self.rate = 0.0
        self.elapsed_s = 0.0

    async def run(self, seconds: float, *, load: float, deaths_share: float, pause_s: float) -> None:
        """Compute the references, find out what the service can do, and then keep it busy for `seconds`."""
        await self._reference()
        await self._calibrate(min(10.0, seconds / 8))
        self.rate = load * self.capacity
        say(f"{self.capacity:.0f} requests/s at most; {self.rate:.0f}/s from here on")
        watching = asyncio.create_task(self.memory.run())
        started = time.monotonic()
        planting = asyncio.create_task(
            self.planter.run(
                deaths_until=started + deaths_share * seconds, until=started + seconds, pause_s=pause_s
            )
        )
        await self._load(started + seconds, planting)
        tally = self.asker.tally
        try:
            await planting
        except RuntimeError as error:
            tally.fail(f"planting ended: {error}")
        self.elapsed_s = time.monotonic() - started
        if self._under_way:
            await asyncio.wait(self._under_way)
        watching.cancel()
        for _ in range(10):
            await self.asker.settle(self._questions.next({"short": 1.0}))
        if (await self._client.ask("GET", "/ready")).status != 200:
            tally.fail("not ready in the end")
        self._client.close()

    # --- before ---------------------------------------------------------------------------------------------

    async def _reference(self) -> None:
        """Each text by itself, at rest, without its fault."""
        for model in self._models:
            self._control.arm("calm", model)
            vectors = []
            for text in self._pool.texts:
                body = json.dumps({"model": model, "input": text}).encode()
                reply = await self._client.ask("POST", EMBEDDINGS, body)
                if reply.status != 200:
                    raise RuntimeError(f"no reference: {reply.status} {reply.body[:200]!r}")
                vectors.append(vectors_in(reply)[0])
            self._control.disarm("calm", model)
            self._pool.vectors[model] = np.stack(vectors)
            say(f"references of {model}: {self._pool.keep_apart(self._pool.vectors[model])} texts")

    async def _calibrate(self, seconds: float) -> None:
        until, done = time.monotonic() + seconds, 0

        async def ask() -> None:
            nonlocal done
            while time.monotonic() < until:
                await self.asker.settle(self._questions.next(ORDINARY))
                done += 1

        await asyncio.gather(*(ask() for _ in range(8)))
        self.capacity = done / seconds

    # --- the load -------------------------------------------------------------------------------------------

    async def _load(self, until: float, planting: asyncio.Task[None]) -> None:
        weights = {**ORDINARY, **REFUSED, **LOOKING, **MISBEHAVING, **FAULTY}
        due = time.monotonic()
        burst_at = due + _BURST_EVERY_S / 2
        while due < until and not (planting.done() and planting.exception()):
            due += self._draw.expovariate(self.rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            number = 1
            if due > burst_at:
                number, burst_at = _BURST, due + _BURST_EVERY_S
            for _ in range(min(number, _MOST_UNDER_WAY - len(self._under_way))):
                self._start(self._questions.next(weights))

    def _start(self, question: ManifestKey) -> asyncio.Task[None]:
        task = asyncio.create_task(self.asker.settle(question))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    async def _plant(self, fault: Fault, model: str) -> None:
        await self.asker.settle(self._questions.with_fault(fault, model))


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    stop_servers_on_sigterm()
    models = _QUICK_MODELS if options.quick else _MODELS
    seconds = 4.0 if options.quick else 60.0 * options.minutes
    with tempfile.TemporaryDirectory(prefix="benchmarks-soak-") as directory:
        scratch = Path(directory)
        control = Control(scratch / "faults")
        settings = {
            "HOST": "127.0.0.1",
            "PORT": "{port}",
            "CACHE_DIR": str(SERVICE_CACHE),
            "MODEL_MAPPING": json.dumps(models),
            "SUPERVISE": "true",
            "WATCHDOG_S": f"{WATCHDOG_S:g}",
            "MAX_REQUEST_TOKENS": str(MAX_REQUEST_TOKENS),
        }
        environment = {f"EMB_PROVIDER_{name}": value for name, value in settings.items()}
        environment |= {"FAULTS_DIR": str(scratch / "faults"), "PYTHONPATH": str(ROOT)}
        command = (sys.executable, "-m", "tests.faults.service")
        say("starting the service: a first start compiles its models")
        with Server(Contender("soak", command, environment, ready="/ready"), scratch) as server:
            server.wait(_COMPILE_S)
            pool = make_pool(20 if options.quick else 400, options.seed)
            soak = Soak(server, control, pool, list(models), options.seed)
            asyncio.run(
                soak.run(
                    seconds,
                    load=options.load,
                    deaths_share=0.4,
                    pause_s=0.5 if options.quick else 3.0,
                )
            )
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(report(soak, control, (used.ru_utime + used.ru_stime) / soak.elapsed_s, options.load))
    tally = soak.asker.tally
    return 1 if tally.wrong or tally.lost or tally.unexpected else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="(default: %(default)s)")
    parser.add_argument("--load", type=float, default=0.65,
                        help="as a share of what the service was seen to do (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true",
                        help="tiny: does everything work? Its figures mean nothing")  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
