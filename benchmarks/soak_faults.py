"""What happens to the service during a soak: faults, deaths of its process; and how its memory goes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

from benchmarks.progress import say
from benchmarks.resources import process_tree
from benchmarks.soak_client import BrokenError

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence

    from benchmarks.soak_client import Client
    from tests.faults.planted import Control, Fault

Excuse = Literal["503", "broken"]

WATCHDOG_S = 4.0
_SLACK_S = 1.0
"""An answer may have been on its way when a disturbance ended."""
_RESTARTS, _RESTARTS_WITHIN_S = 2, 600.0
"""Breakdowns that are planted in a model: after two more it would be given up, as is right."""
_BETWEEN_RESTARTS_S = 65.0
"""Longer than any request lives: one that meets two breakdowns counts as their cause, as is right too."""
_BETWEEN_DEATHS_S = (20.0, 100.0)
"""Early deaths make the supervisor wait a little, late ones do not."""
_BACK_WITHIN_S = 120.0


@dataclass(slots=True)
class Disturbance:
    """A time in which an answer may fail to come at first. Times of `time.monotonic`."""

    model: str
    """Empty: all models, since the process died; a request under way may lose its connection then."""
    since: float
    until: float = float("inf")


@dataclass(slots=True)
class Disturbances:
    """All that was planted and can be seen from outside."""

    all: list[Disturbance] = field(default_factory=list)

    def excuse(self, what: Excuse, model: str, sent: float, ended: float) -> bool:
        """Whether a request that was under way from `sent` to `ended` may have ended like that."""
        return any(
            each.since <= ended
            and sent <= each.until + _SLACK_S
            and (not each.model or (what == "503" and each.model == model))
            for each in self.all
        )


class Planter:
    """Plants a fault every few seconds."""

    def __init__(
        self,
        control: Control,
        client: Client,
        models: Sequence[str],
        draw: random.Random,
        disturbances: Disturbances,
        *,
        ask: Callable[[Fault, str], Coroutine[None, None, None]],
        supervisor: int,
    ) -> None:
        """`ask` sends a text with the word of a fault and sees to it that it is answered in the end."""
        self._control, self._client, self._models, self._draw = control, client, models, draw
        self._disturbances = disturbances
        self._ask = ask
        self._supervisor = supervisor
        self._restarts: list[tuple[float, str]] = []
        self._next_death_at = 0.0
        self.planted: Counter[str] = Counter()

    async def run(self, *, deaths_until: float, until: float, pause_s: float) -> None:
        """Plant until the time is over; process deaths only in the first part."""
        while (now := time.monotonic()) < until - 2 * pause_s:
            await asyncio.sleep(self._draw.uniform(0.5, 1.5) * pause_s)
            model = self._draw.choice(list(self._models))
            if now < deaths_until and now > self._next_death_at:
                await self._death(model)
                continue
            kinds: dict[str, Callable[[str], Awaitable[None]]] = {
                "memory runs out": self._memory,
                "hang, released": self._hang,
                "counting fails": self._counting,
            }
            if self._may_restart(model):
                kinds |= {"thread ends": self._thread_ends, "device lost": self._broken}
            kind = self._draw.choice(list(kinds))
            self.planted[kind] += 1
            await kinds[kind](model)

    def pid(self) -> int:
        """Return the process that serves: of those that loaded models, the last."""
        return int(self._control.events("load")[-1]["pid"])

    # --- what a process survives -------------------------------------------------------------------------

    async def _memory(self, model: str) -> None:
        self._control.arm("memory", model, "256")  # no single text is longer
        await asyncio.sleep(2.0)
        self._control.disarm("memory", model)

    async def _hang(self, model: str) -> None:
        self._control.arm("hang", model)
        asked = asyncio.create_task(self._ask("hang", model))
        await asyncio.sleep(self._draw.uniform(0.2, 0.5 * WATCHDOG_S))
        self._control.disarm("hang", model)
        await asked

    async def _counting(self, model: str) -> None:
        self._control.arm("on-batch", model, "RuntimeError")
        await self._ask("slow", model)

    async def _thread_ends(self, model: str) -> None:
        async with self._disturbed(model):
            self._control.arm("on-batch", model, "SystemExit")
            await self._ask("slow", model)
            await self._ready()

    async def _broken(self, model: str) -> None:
        async with self._disturbed(model):
            self._control.arm("broken", model)
            await self._ask("broken", model)
            await self._ready()

    def _may_restart(self, model: str) -> bool:
        now = time.monotonic()
        recent = [at for at, which in self._restarts if which == model and now - at < _RESTARTS_WITHIN_S]
        return len(recent) < _RESTARTS and (not recent or now - recent[-1] > _BETWEEN_RESTARTS_S)

    # --- what it does not ---------------------------------------------------------------------------------

    async def _death(self, model: str) -> None:
        kinds: dict[str, Callable[[str], Awaitable[None]]] = {
            "SIGSEGV": self._segv,
            "SIGKILL": self._kill,
            "hang, for good": self._hang_for_good,
        }
        # Each in its turn: a short soak has them all too.
        kind = list(kinds)[sum(self.planted[kind] for kind in kinds) % len(kinds)]
        self.planted[kind] += 1
        say(f"planting: {kind}")
        old = self.pid()
        async with self._disturbed(""):
            await kinds[kind](model)
            await self._until(lambda: self.pid() != old, "a new process")
            self._control.disarm("hang", model)
            await self._ready()
        self._restarts.clear()
        self._next_death_at = time.monotonic() + self._draw.uniform(*_BETWEEN_DEATHS_S)

    async def _segv(self, model: str) -> None:
        self._control.arm("segv", model)
        await self._ask("segv", model)

    async def _kill(self, _: str) -> None:
        pid = self.pid()
        if pid not in process_tree(self._supervisor) or pid == self._supervisor:
            raise RuntimeError(f"process {pid} is no child of the supervisor")
        os.kill(pid, signal.SIGKILL)

    async def _hang_for_good(self, model: str) -> None:
        self._control.arm("hang", model)
        old = self.pid()
        asked = asyncio.create_task(self._ask("hang", model))
        await self._until(lambda: self.pid() != old, "the process that hangs to be replaced")
        self._control.disarm("hang", model)
        await asked

    # --- waiting ------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _disturbed(self, model: str) -> AsyncIterator[None]:
        disturbance = Disturbance(model, time.monotonic())
        self._disturbances.all.append(disturbance)
        if model:
            self._restarts.append((time.monotonic(), model))
        yield
        disturbance.until = time.monotonic()

    async def _ready(self) -> None:
        async def is_ready() -> bool:
            with suppress(BrokenError):
                return (await self._client.ask("GET", "/ready")).status == 200
            return False

        give_up_at = time.monotonic() + _BACK_WITHIN_S
        while not await is_ready():
            if time.monotonic() > give_up_at:
                raise RuntimeError(f"not ready again within {_BACK_WITHIN_S:g} s")
            await asyncio.sleep(0.05)

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        give_up_at = time.monotonic() + _BACK_WITHIN_S
        while not condition():
            if time.monotonic() > give_up_at:
                raise RuntimeError(f"waited {_BACK_WITHIN_S:g} s for {what}")
            await asyncio.sleep(0.05)


@dataclass(frozen=True, slots=True)
class MemoryOfOne:
    """Resident memory of the process that served last, in MiB."""

    lived_s: float
    settled_after_s: float
    settled: float
    end: float
    highest: float
    course: list[float]
    """At the ends of the tenths of that time."""

    @property
    def ratio(self) -> float:
        return self.end / self.settled


class MemoryLog:
    """Resident memory of whichever process serves, once a second."""

    def __init__(self, pid: Callable[[], int]) -> None:
        self._pid = pid
        self._samples: list[tuple[float, int, float]] = []

    async def run(self) -> None:
        """Read until cancelled."""
        while True:
            pid = self._pid()
            if resident := _resident_mib(pid):
                self._samples.append((time.monotonic(), pid, resident))
            await asyncio.sleep(1.0)

    def highest(self) -> float:
        """Return the highest of any process, in MiB."""
        return max(resident for *_, resident in self._samples)

    def of_the_last(self, settled_after_s: float) -> MemoryOfOne:
        """Compare the last process at its end with itself so long after its start, or a third of its life if less."""
        last = self._samples[-1][1]
        own = [(at, resident) for at, pid, resident in self._samples if pid == last]
        began, ended = own[0][0], own[-1][0]
        after = min(settled_after_s, (ended - began) / 3)
        # Over some seconds: a large batch under way weighs tens of MiB for a moment.
        near = sorted(own, key=lambda sample: abs(sample[0] - began - after))[:10]
        return MemoryOfOne(
            lived_s=ended - began,
            settled_after_s=after,
            settled=median(resident for _, resident in near),
            end=median(resident for _, resident in own[-10:]),
            highest=max(resident for _, resident in own),
            course=[own[len(own) * tenth // 10 - 1][1] for tenth in range(1, 11) if len(own) >= 10],
        )


def _resident_mib(pid: int) -> float:
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) / 1024
    return 0.0
