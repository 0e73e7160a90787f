"""What the OpenVINO backend refuses, how it shares a processor among threads, and how it keeps memory bounded."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
import pytest

from emb_model_provider.backends.base import ModelDescription, TokenBatch
from emb_model_provider.backends.hardware import cgroup_cpu_limit, native_bf16, usable_cpus
from emb_model_provider.backends.openvino_cpu import backend as split_batch
from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
from emb_model_provider.backends.openvino_cpu.runtime import stream_layout
from emb_model_provider.errors import InferenceError, LoadError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

WIDTH, WORDS = 16, 50


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small graph of the form that artifacts have: the mean of looked-up rows, over the pooling mask."""
    ops = ov.opset13
    table = np.random.default_rng(3).normal(size=(WORDS, WIDTH)).astype(np.float32)
    inputs = []
    for name in ("input_ids", "attention_mask", "pooling_mask"):
        parameter = ops.parameter([-1, -1], np.int64, name=name)
        parameter.output(0).get_tensor().set_names({name})
        inputs.append(parameter)
    rows = ops.gather(ops.constant(table), inputs[0], ops.constant(0))
    mask = ops.unsqueeze(ops.convert(inputs[2], "f32"), ops.constant(2))
    summed = ops.reduce_sum(ops.multiply(rows, mask), ops.constant(1))
    path = tmp_path_factory.mktemp("graph") / "model.xml"
    mean = ops.divide(summed, ops.reduce_sum(mask, ops.constant(1)))
    ov.save_model(ov.Model([mean], inputs), path, compress_to_fp16=False)
    np.save(path.with_name("table.npy"), table)
    return path


def description(**changes: Any) -> ModelDescription:
    values: dict[str, Any] = {
        "dimension": WIDTH,
        "max_length": 100,
        "vocab_size": WORDS,
        "tokenizer_json": "{}",
        "pad_token_id": 0,
        "padding_side": "right",
        "normalize": False,
        "pooling": "mean",
        "prompts": {},
        "default_prompt": None,
        "excludes_prompt": True,
        "matryoshka": None,
        "precision": "fp32",
        "device": "cpu",
        "backend": "openvino",
    }
    return ModelDescription(**{**values, **changes})


def expected(graph: Path, batch: TokenBatch) -> NDArray[np.float32]:
    table = np.load(graph.with_name("table.npy"))
    pooled = [row[skip:] for row, skip in zip(batch.ids, batch.prompt_lengths, strict=True)]
    return np.stack([table[row].mean(axis=0) for row in pooled])


def random_batch(rng: np.random.Generator, inputs: int, longest: int) -> TokenBatch:
    lengths = rng.integers(2, longest + 1, inputs)
    ids = [rng.integers(0, WORDS, length).tolist() for length in lengths]
    return TokenBatch(ids=ids, prompt_lengths=[int(rng.integers(0, len(row))) for row in ids])


SIDE_BY_SIDE = """
import faulthandler, sys, threading
from emb_model_provider.backends.openvino_cpu.runtime import openvino
faulthandler.dump_traceback_later(60, exit=True)
sys.setswitchinterval(1e-6)
together = threading.Barrier(2)
def first():
    together.wait()
    openvino().Type.i64.to_dtype()
sys.modules["openvino_telemetry"] = None
import openvino as imported_before_they_start
threads = [threading.Thread(target=first) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


def test_threads_that_use_openvino_first_do_not_lock_each_other_up() -> None:
    """Two models that load side by side: without the care of `openvino()` most of these processes never end."""
    started = [subprocess.Popen([sys.executable, "-c", SIDE_BY_SIDE]) for _ in range(5)]
    assert [process.wait(120) for process in started] == [0] * 5


# --- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cpus", [1, 2, 8])
def test_rows_keep_their_order(side: str, cpus: int, graph: Path) -> None:
    """However a batch is cut into parts and padded, row i of the result belongs to input i."""
    backend = OpenVinoBackend(graph, description(padding_side=side), cpus=cpus)
    rng = np.random.default_rng(1)
    for inputs, longest in [(1, 2), (3, 40), (64, 100), (200, 70)]:
        batch = random_batch(rng, inputs, longest)
        np.testing.assert_allclose(backend.embed(batch), expected(graph, batch), rtol=1e-4, atol=1e-5)


def test_threads_do_not_mix_their_batches(graph: Path) -> None:
    """More threads than lanes, batches of all shapes: everybody gets the vectors of their own inputs."""
    backend = OpenVinoBackend(graph, description(), cpus=2)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            batch = random_batch(rng, int(rng.integers(1, 40)), int(rng.integers(2, 100)))
            np.testing.assert_allclose(backend.embed(batch), expected(graph, batch), rtol=1e-4, atol=1e-5)

    with ThreadPoolExecutor(5) as pool:
        assert len(list(pool.map(work, range(5)))) == 5
    batch = random_batch(np.random.default_rng(0), 3, 9)
    np.testing.assert_allclose(backend.embed(batch), expected(graph, batch), rtol=1e-4, atol=1e-5)


def test_a_result_is_not_overwritten_by_the_next_batch(graph: Path) -> None:
    """Vectors are copied out of the runtime's memory before it is used again."""
    backend = OpenVinoBackend(graph, description(), cpus=1)
    batches = [random_batch(np.random.default_rng(seed), 5, 30) for seed in range(8)]
    kept = [backend.embed(batch) for batch in batches]
    for batch, vectors in zip(batches, kept, strict=True):
        np.testing.assert_allclose(vectors, expected(graph, batch), rtol=1e-4, atol=1e-5)


# --- sharing and bounding ---------------------------------------------------------------------------------------


class Recorded:
    """An infer request that notes what it is given."""

    def __init__(self, real: Any, notes: list[Any], name: str, gate: threading.Event | None = None) -> None:
        self._real, self._notes, self._name, self._gate = real, notes, name, gate

    def infer(self, inputs: dict[str, Any], **options: bool) -> Any:
        self._notes.append((self._name, inputs["input_ids"].shape))
        if self._gate is not None:
            self._gate.wait(30)
        return self._real.infer(inputs, **options)


def test_a_lone_batch_gets_all_threads_and_others_a_lane(graph: Path) -> None:
    """The wide lane answers while nothing else runs; whoever comes meanwhile gets a lane of their own."""
    backend = OpenVinoBackend(graph, description(), cpus=2)
    notes: list[Any] = []
    gate = threading.Event()
    backend._latency_request = Recorded(backend._latency_request, notes, "wide", gate)
    streams = [backend._requests.get() for _ in range(backend.streams)]
    for stream in streams:
        backend._requests.put(Recorded(stream, notes, "lane"))
    batch = TokenBatch(ids=[[1, 2]], prompt_lengths=[0])
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(backend.embed, batch)
        while not notes:
            pass
        backend.embed(batch)
        gate.set()
        first.result()
        backend.embed(batch)
    assert [name for name, _ in notes] == ["wide", "lane", "wide"]


def test_no_part_holds_more_tokens_than_the_budget(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is run in parts of neighbours in length; a single input that is longer runs alone."""
    monkeypatch.setattr(split_batch, "MICRO_BATCH_TOKENS", 128)
    backend = OpenVinoBackend(graph, description(max_length=300), cpus=1)
    notes: list[Any] = []
    backend._requests.put(Recorded(backend._requests.get(), notes, "lane"))
    batch = random_batch(np.random.default_rng(5), 100, 200)
    np.testing.assert_allclose(backend.embed(batch), expected(graph, batch), rtol=1e-4, atol=1e-5)
    shapes = [shape for _, shape in notes]
    assert sum(rows for rows, _ in shapes) == 100
    assert all(rows * length <= 128 or rows == 1 for rows, length in shapes)
    assert all(length <= 64 or length % 8 == 0 for _, length in shapes)


def test_a_length_is_never_rounded_beyond_what_the_model_reads(graph: Path) -> None:
    """A model of 70 positions gets 70 tokens, not 72."""
    backend = OpenVinoBackend(graph, description(max_length=70), cpus=1)
    notes: list[Any] = []
    backend._requests.put(Recorded(backend._requests.get(), notes, "lane"))
    for length in (64, 65, 69, 70):
        backend.embed(TokenBatch(ids=[[1] * length], prompt_lengths=[0]))
    assert [shape for _, shape in notes] == [(1, 64), (1, 70), (1, 70), (1, 70)]


@pytest.mark.parametrize(
    ("cpus", "streams", "wide"), [(1, 1, False), (2, 2, True), (4, 4, True), (16, 4, True)]
)
def test_lanes_follow_the_processors(cpus: int, streams: int, wide: bool) -> None:
    """A lane for each processor, up to four; with one there is nothing to widen."""
    layout = stream_layout(cpus)
    assert (layout.streams, layout.threads, layout.has_latency_request) == (streams, cpus, wide)


# --- refusing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[[5, WORDS]], [[-1, 5]], [[5] * 101]])
def test_tokens_the_model_cannot_look_up_are_refused(ids: list[list[int]], graph: Path) -> None:
    """An id or a length outside the model is an error, and the backend answers the next batch."""
    backend = OpenVinoBackend(graph, description(), cpus=1)
    with pytest.raises(InferenceError):
        backend.embed(TokenBatch(ids=ids, prompt_lengths=[0]))
    assert backend.embed(TokenBatch(ids=[[5]], prompt_lengths=[0])).shape == (1, WIDTH)


def test_fp32_is_had_whatever_the_model_computes_in(tmp_path: Path) -> None:
    """A product of matrices at bf16 is off by its rounding; the same backend gives it at fp32 too, and then bf16 again."""
    ops = ov.opset13
    rng = np.random.default_rng(5)
    table, matrix = (rng.normal(size=shape).astype(np.float32) for shape in ((WORDS, 256), (256, WIDTH)))
    inputs = []
    for name in ("input_ids", "attention_mask"):
        parameter = ops.parameter([-1, -1], np.int64, name=name)
        parameter.output(0).get_tensor().set_names({name})
        inputs.append(parameter)
    mask = ops.unsqueeze(ops.convert(inputs[1], "f32"), ops.constant(2))
    rows = ops.multiply(ops.gather(ops.constant(table), inputs[0], ops.constant(0)), mask)
    product = ops.matmul(rows, ops.constant(matrix), False, False)
    path = tmp_path / "model.xml"
    ov.save_model(ov.Model([ops.reduce_sum(product, ops.constant(1))], inputs), path, compress_to_fp16=False)
    backend = OpenVinoBackend(path, description(precision="bf16", excludes_prompt=False), cpus=2)
    batch = TokenBatch(ids=[[1, 2, 3], [4] * 70, [5]], prompt_lengths=[0, 0, 0])
    exact = np.stack([(table[row] @ matrix).sum(axis=0) for row in batch.ids])
    bucket_length = backend.embed(batch)
    np.testing.assert_allclose(backend.embed_fp32(batch), exact, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(backend.embed(batch), bucket_length)
    if native_bf16():
        assert np.abs(bucket_length - exact).max() > 1e-3
    with pytest.raises(InferenceError):
        backend.embed_fp32(TokenBatch(ids=[[WORDS]], prompt_lengths=[0]))


def test_a_closed_backend_does_not_answer(graph: Path) -> None:
    """close() lets go of the model, and tells whoever holds the artifact, once."""
    closed: list[bool] = []
    backend = OpenVinoBackend(graph, description(), cpus=2, on_close=lambda: closed.append(True))
    backend.close()
    backend.close()
    assert closed == [True]
    with pytest.raises(RuntimeError, match="closed"):
        backend.embed(TokenBatch(ids=[[5]], prompt_lengths=[0]))


def test_a_graph_that_cannot_be_read_is_a_load_error(tmp_path: Path) -> None:
    """The message names the file and what to do."""
    (tmp_path / "model.xml").write_text("<net>")
    with pytest.raises(LoadError, match=r"model\.xml.*EMB_PROVIDER_BACKEND=torch"):
        OpenVinoBackend(tmp_path / "model.xml", description(), cpus=1)


# --- the processor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"sys/fs/cgroup/cpu.max": "150000 100000", "proc/self/cgroup": "0::/"}, 1.5),
        ({"sys/fs/cgroup/cpu.max": "max 100000", "proc/self/cgroup": "0::/"}, None),
        (
            {
                "sys/fs/cgroup/a/cpu.max": "400000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "proc/self/cgroup": "0::/a/b",
            },
            4.0,
        ),
        ({"sys/fs/cgroup/cpu.max": "50000 100000", "proc/self/cgroup": "0::/not/mounted/here"}, 0.5),
        (
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
                "proc/self/cgroup": "4:cpu,cpuacct:/\n1:name=systemd:/",
            },
            3.0,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "proc/self/cgroup": "4:cpu:/docker/abc",
            },
            None,
        ),
        ({}, None),
        ({"sys/fs/cgroup/cpu.max": "nonsense", "proc/self/cgroup": "0::/"}, None),
    ],
)
def test_the_control_groups_limit_is_read(files: dict[str, str], limit: float | None, tmp_path: Path) -> None:
    """v2 and v1, nested groups, a container's own view, no limit, nothing there."""
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert cgroup_cpu_limit(tmp_path) == limit
    allowed = len(os.sched_getaffinity(0))
    assert usable_cpus(tmp_path) == (allowed if limit is None else max(1, min(allowed, int(limit))))


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 sve\n", True),
        ("", False),
    ],
)
def test_native_bf16_is_read_from_the_processors_flags(cpuinfo: str, native: bool, tmp_path: Path) -> None:
    """AMX or AVX512-BF16, or ARM's extension; AVX512 alone would only emulate it."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    assert native_bf16(tmp_path) is native
    assert native_bf16(tmp_path / "elsewhere") is False
