"""CPU time and memory of processes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from benchmarks.resources import MemoryLog, cpu_time, resident_mib, tree_resident_mib


def test_a_process_tree_includes_children() -> None:
    """Memory and CPU time of a child count for the tree of its parent."""
    before = cpu_time(os.getpid())
    work = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        own, tree = resident_mib(os.getpid()), tree_resident_mib(os.getpid())
        assert 0 < resident_mib(child.pid) <= tree - 0.9 * own
        used = cpu_time(os.getpid()).since(before)
        assert used.tree_s >= 0.25
        assert used.machine_s >= 0.25
        child.communicate(b"\n")
    assert cpu_time(os.getpid()).since(before).tree_s >= 0.25, "the time of a child that has ended"


def test_a_process_that_has_ended_has_no_memory() -> None:
    """A benchmark may read the memory of a process that has just crashed."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert resident_mib(child.pid) == tree_resident_mib(child.pid) == 0


async def test_memory_log_samples_the_current_process() -> None:
    """The first sample is taken at once."""
    log = MemoryLog(os.getpid)
    sampling = asyncio.create_task(log.run())
    await asyncio.sleep(0.1)
    sampling.cancel()
    assert log.highest() == pytest.approx(resident_mib(os.getpid()), rel=0.2)
    assert log.summarize_last(120.0).ratio == 1.0
