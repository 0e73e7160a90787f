"""Injects failures into the service during the soak test."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import psutil

from benchmarks.report import log_progress
from benchmarks.soak_client import BrokenConnectionError

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Awaitable, Callable

    from benchmarks.soak_requests import RequestFactory
    from benchmarks.soak_sender import RequestSender
    from tests.faults.planted import Control, Fault

WATCHDOG_S = 4.0
"""`WATCHDOG_S` of the service."""
_MAX_RESTARTS, _RESTART_WINDOW_S = 2, 600.0
"""Restarts of a model within this time. A model that is restarted more often is marked as failed, as it should be."""
_RESTART_INTERVAL_S = 65.0
"""Longer than the timeout of requests, because a request that meets two restarts counts as their cause."""
_PROCESS_END_INTERVAL_S = (20.0, 100.0)
"""The supervisor delays the restart of a process that ends soon after its start, but not later."""
_RECOVERY_TIMEOUT_S = 120.0
_POLL_S = 0.05


class FaultInjector:
    """Injects a failure every few seconds."""

    def __init__(
        self,
        control: Control,
        sender: RequestSender,
        requests: RequestFactory,
        random: random.Random,
        supervisor_pid: int,
    ) -> None:
        self.injected: Counter[str] = Counter()
        self._control, self._sender, self._requests, self._random = control, sender, requests, random
        self._supervisor = psutil.Process(supervisor_pid)
        self._restarts: list[tuple[float, str]] = []
        self._next_process_end = 0.0

    async def run(self, *, process_ends_until: float, until: float, pause_s: float) -> None:
        """Inject failures until `until`, and end the process only until `process_ends_until`."""
        while (now := time.monotonic()) < until - 2 * pause_s:
            await asyncio.sleep(self._random.uniform(0.5, 1.5) * pause_s)
            model = self._random.choice(list(self._requests.models))
            if self._next_process_end < now < process_ends_until:
                await self._end_process(model)
                continue
            kinds: dict[str, Callable[[str], Awaitable[None]]] = {
                "out of memory for large batches": self._out_of_memory,
                "hang that ends": self._hang,
                "error in the metrics": self._metrics_error,
            }
            if self._may_restart(model):
                kinds |= {"thread ends": self._end_thread, "device lost": self._lose_device}
            kind = self._random.choice(list(kinds))
            self.injected[kind] += 1
            await kinds[kind](model)

    def service_pid(self) -> int:
        """Return the process that serves: the last one that loaded a model."""
        return int(self._control.events("load")[-1]["pid"])

    # --- failures that the process survives ---------------------------------------------------------------

    async def _out_of_memory(self, model: str) -> None:
        self._control.arm("memory", model, "256")  # more tokens than a single text has
        await asyncio.sleep(2.0)
        self._control.disarm("memory", model)

    async def _hang(self, model: str) -> None:
        self._control.arm("hang", model)
        sending = asyncio.create_task(self._send("hang", model))
        await asyncio.sleep(self._random.uniform(0.2, 0.5 * WATCHDOG_S))
        self._control.disarm("hang", model)
        await sending

    async def _metrics_error(self, model: str) -> None:
        self._control.arm("on-batch", model, "RuntimeError")
        await self._send("slow", model)

    async def _end_thread(self, model: str) -> None:
        async with self._outage(model):
            self._control.arm("on-batch", model, "SystemExit")
            await self._send("slow", model)
            await self._wait_until_ready()

    async def _lose_device(self, model: str) -> None:
        async with self._outage(model):
            self._control.arm("broken", model)
            await self._send("broken", model)
            await self._wait_until_ready()

    def _may_restart(self, model: str) -> bool:
        now = time.monotonic()
        recent = [at for at, restarted in self._restarts if restarted == model and now - at < _RESTART_WINDOW_S]
        return not recent or (len(recent) < _MAX_RESTARTS and now - recent[-1] > _RESTART_INTERVAL_S)

    # --- failures that end the process ----------------------------------------------------------------------

    async def _end_process(self, model: str) -> None:
        kinds: dict[str, Callable[[str], Awaitable[None]]] = {
            "SIGSEGV": self._segfault,
            "SIGKILL": self._kill,
            "hang that never ends": self._hang_forever,
        }
        # In turn, so that a short run includes all of them.
        kind = list(kinds)[sum(self.injected[kind] for kind in kinds) % len(kinds)]
        self.injected[kind] += 1
        log_progress(f"injecting: {kind}")
        old_pid = self.service_pid()
        async with self._outage(""):
            await kinds[kind](model)
            await self._wait_until(lambda: self.service_pid() != old_pid, "a new process")
            self._control.disarm("hang", model)
            await self._wait_until_ready()
        self._restarts.clear()
        self._next_process_end = time.monotonic() + self._random.uniform(*_PROCESS_END_INTERVAL_S)

    async def _segfault(self, model: str) -> None:
        self._control.arm("segv", model)
        await self._send("segv", model)

    async def _kill(self, _: str) -> None:
        pid = self.service_pid()
        children = {child.pid: child for child in self._supervisor.children(recursive=True)}
        if pid not in children:
            raise RuntimeError(f"Process {pid} is not a child of the supervisor.")
        children[pid].kill()

    async def _hang_forever(self, model: str) -> None:
        self._control.arm("hang", model)
        old_pid = self.service_pid()
        sending = asyncio.create_task(self._send("hang", model))
        await self._wait_until(lambda: self.service_pid() != old_pid, "the replacement of a process that hangs")
        self._control.disarm("hang", model)
        await sending

    # --- helpers --------------------------------------------------------------------------------------------

    async def _send(self, fault: Fault, model: str) -> None:
        await self._sender.send(self._requests.with_fault(fault, model))

    @asynccontextmanager
    async def _outage(self, model: str) -> AsyncIterator[None]:
        outage = self._sender.outages.begin(model)
        if model:
            self._restarts.append((time.monotonic(), model))
        yield
        outage.end = time.monotonic()

    async def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _RECOVERY_TIMEOUT_S
        while time.monotonic() < deadline:
            with suppress(BrokenConnectionError):
                if (await self._sender.client.request("GET", "/ready")).status == 200:
                    return
            await asyncio.sleep(_POLL_S)
        raise RuntimeError(f"The service is not ready again within {_RECOVERY_TIMEOUT_S:g} s.")

    async def _wait_until(self, condition: Callable[[], bool], event: str) -> None:
        deadline = time.monotonic() + _RECOVERY_TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"Waited {_RECOVERY_TIMEOUT_S:g} s for {event}.")
            await asyncio.sleep(_POLL_S)
