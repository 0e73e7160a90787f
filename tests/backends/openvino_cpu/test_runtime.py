"""Importing OpenVINO from several threads, the layout of streams, and the memory of mapped files."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from emb_model_provider.backends.base import Tuning
from emb_model_provider.backends.openvino_cpu.runtime import compile_streams, openvino, release_pages, stream_layout

if TYPE_CHECKING:
    from emb_model_provider.backends.base import ComputePrecision

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


@pytest.mark.parametrize(
    ("compute", "group", "expected"), [("int8", 64, 64), ("int8", None, 32), ("fp32", 64, 0), ("bf16", None, 0)]
)
def test_the_number_of_activations_that_share_a_scale(
    tmp_path: Path, compute: ComputePrecision, group: int | None, expected: int
) -> None:
    """The most accurate one unless the description has another, for streams and for the latency request."""
    ops = openvino().opset13
    ids = ops.parameter([-1, 64], dtype=np.float32, name="input_ids")
    product = ops.matmul(ids, ops.constant(np.ones((8, 64), dtype=np.float32)), False, True)
    openvino().save_model(openvino().Model([product], [ids], "plain"), tmp_path / "model.xml")
    compiled = compile_streams(tmp_path / "model.xml", compute, stream_layout(2), Tuning(), group)
    for graph in (compiled.streams, compiled.compile_latency().get_compiled_model()):
        assert graph.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == expected


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_release_pages(tmp_path: Path) -> None:
    """A mapped file is not resident afterwards, and can still be read."""
    path = tmp_path / "model.bin"
    content = np.random.default_rng(0).bytes(1 << 20)
    path.write_bytes(content)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        assert mapping[:] == content
        assert resident_kb(path) >= 1024
        release_pages(path)
        assert resident_kb(path) == 0
        assert mapping[:] == content
    release_pages(path)


def resident_kb(path: Path) -> int:
    """Return how much of a mapped file is in the memory of this process."""
    lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.endswith(str(path)))
    return int(next(line for line in lines[start:] if line.startswith("Rss:")).split()[1])
