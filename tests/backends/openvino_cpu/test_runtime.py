"""Importing OpenVINO from several threads, and the layout of streams."""

from __future__ import annotations

import subprocess
import sys

import pytest

from emb_model_provider.backends.openvino_cpu.runtime import stream_layout

CONCURRENT = """
import faulthandler, sys, threading
from emb_model_provider.backends.openvino_cpu.runtime import openvino
faulthandler.dump_traceback_later(60, exit=True)
sys.setswitchinterval(1e-6)
barrier = threading.Barrier(2)
def first():
    barrier.wait()
    openvino().Type.i64.to_dtype()
sys.modules["openvino_telemetry"] = None
import openvino as imported_before_the_threads_start
threads = [threading.Thread(target=first) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


def test_the_first_use_in_two_threads_does_not_deadlock() -> None:
    """As when two models are loaded at the same time. Without the lock most of these processes would not end."""
    started = [subprocess.Popen([sys.executable, "-c", CONCURRENT]) for _ in range(5)]
    assert [process.wait(120) for process in started] == [0] * 5


@pytest.mark.parametrize(
    ("cpus", "streams", "has_latency_request"), [(1, 1, False), (2, 2, True), (4, 4, True), (16, 4, True)]
)
def test_the_number_of_streams(cpus: int, streams: int, has_latency_request: bool) -> None:
    """One per processor, up to four. One stream needs no latency request."""
    layout = stream_layout(cpus)
    assert (layout.streams, layout.threads, layout.has_latency_request) == (streams, cpus, has_latency_request)
