"""CPU time and memory of processes, and CPU time of the machine (Linux)."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class CpuTime:
    """CPU time used so far, in seconds."""

    tree_s: float
    """By a process and its descendants, including children that have ended."""
    machine_s: float
    """By all processes."""

    def since(self, earlier: CpuTime) -> CpuTime:
        return CpuTime(self.tree_s - earlier.tree_s, self.machine_s - earlier.machine_s)


def cpu_time(pid: int) -> CpuTime:
    """Return the CPU time of a process tree, and of the machine."""
    tree_s = 0.0
    for process in _process_tree(pid):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            tree_s += times.user + times.system + times.children_user + times.children_system
    # Idle time and time spent waiting for a disk do not count. Guest time is a part of user time.
    times = psutil.cpu_times()
    return CpuTime(tree_s, times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process in MiB, 0 if it has ended."""
    with suppress(psutil.NoSuchProcess):
        return float(psutil.Process(pid).memory_info().rss / _MIB)
    return 0.0


def tree_resident_mib(pid: int) -> float:
    """Return the resident memory of a process tree in MiB. Pages that processes share count for each of them."""
    return sum(resident_mib(process.pid) for process in _process_tree(pid))


@dataclass(frozen=True, slots=True)
class MemorySummary:
    """Resident memory of one process over time, in MiB."""

    lifetime_s: float
    settled_after_s: float
    settled: float
    """`settled_after_s` after the start of the process."""
    end: float
    highest: float
    course: list[float]
    """At the end of each tenth of the lifetime."""

    @property
    def ratio(self) -> float:
        return self.end / self.settled


class MemoryLog:
    """Resident memory of the process that `pid` returns, sampled every second."""

    def __init__(self, pid: Callable[[], int]) -> None:
        self._pid = pid
        self._samples: list[tuple[float, int, float]] = []

    async def run(self) -> None:
        """Take samples until cancelled."""
        while True:
            pid = self._pid()
            if resident := resident_mib(pid):
                self._samples.append((time.monotonic(), pid, resident))
            await asyncio.sleep(1.0)

    def highest(self) -> float:
        """Return the highest value of any process, in MiB."""
        return max(resident for *_, resident in self._samples)

    def summarize_last(self, settled_after_s: float) -> MemorySummary:
        """Compare the end of the last process with a time after its start.

        Args:
            settled_after_s: This time; a third of the lifetime of the process if that is shorter.
        """
        last_pid = self._samples[-1][1]
        samples = [(at, resident) for at, pid, resident in self._samples if pid == last_pid]
        started, ended = samples[0][0], samples[-1][0]
        settled_after_s = min(settled_after_s, (ended - started) / 3)
        # Medians of ten samples, because a large batch takes tens of MiB for a moment.
        nearest = sorted(samples, key=lambda sample: abs(sample[0] - started - settled_after_s))[:10]
        tenths = range(1, 11) if len(samples) >= 10 else ()
        return MemorySummary(
            lifetime_s=ended - started,
            settled_after_s=settled_after_s,
            settled=median(resident for _, resident in nearest),
            end=median(resident for _, resident in samples[-10:]),
            highest=max(resident for _, resident in samples),
            course=[samples[len(samples) * tenth // 10 - 1][1] for tenth in tenths],
        )


def _process_tree(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []
