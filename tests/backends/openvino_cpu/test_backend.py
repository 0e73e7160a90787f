"""The OpenVINO backend: vectors, micro-batches, concurrent batches, and invalid inputs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
import pytest

from emb_model_provider.backends.arrays import pad_inputs
from emb_model_provider.backends.base import ModelDescription, TokenBatch
from emb_model_provider.backends.hardware import native_bf16
from emb_model_provider.backends.openvino_cpu import infer_requests
from emb_model_provider.backends.openvino_cpu.backend import MICRO_BATCH_TOKENS, OpenVinoBackend
from emb_model_provider.backends.openvino_cpu.infer_requests import (
    _USES_BEFORE_COMPILING,
    LATENCY_TOKENS,
    BackgroundCompiler,
    LatencyRequest,
    RequestPool,
    ShortRequests,
)
from emb_model_provider.backends.openvino_cpu.runtime import Compiled, compile_streams
from emb_model_provider.errors import InferenceError, LoadError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

WIDTH, WORDS = 16, 50


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small graph with the inputs of an artifact: the mean of rows of a table, over the pooling mask."""
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


# --- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cpus", [1, 2, 8])
def test_rows_keep_their_order(side: str, cpus: int, graph: Path) -> None:
    """Row i of the result belongs to input i, however the batch is split and padded."""
    backend = OpenVinoBackend(graph, description(padding_side=side), cpus=cpus)
    rng = np.random.default_rng(1)
    for inputs, longest in [(1, 2), (3, 40), (64, 100), (200, 70)]:
        batch = random_batch(rng, inputs, longest)
        np.testing.assert_allclose(backend.run(batch).dense, expected(graph, batch), rtol=1e-4, atol=1e-5)


def test_concurrent_batches_are_not_mixed(graph: Path) -> None:
    """With more threads than streams, and batches of all shapes."""
    backend = OpenVinoBackend(graph, description(), cpus=2)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            batch = random_batch(rng, int(rng.integers(1, 40)), int(rng.integers(2, 100)))
            np.testing.assert_allclose(backend.run(batch).dense, expected(graph, batch), rtol=1e-4, atol=1e-5)

    with ThreadPoolExecutor(5) as pool:
        assert len(list(pool.map(work, range(5)))) == 5
    batch = random_batch(np.random.default_rng(0), 3, 9)
    np.testing.assert_allclose(backend.run(batch).dense, expected(graph, batch), rtol=1e-4, atol=1e-5)


def test_a_result_is_not_overwritten_by_the_next_batch(graph: Path) -> None:
    """Vectors are copied from the memory of the runtime before it is used again."""
    backend = OpenVinoBackend(graph, description(), cpus=1)
    batches = [random_batch(np.random.default_rng(seed), 5, 30) for seed in range(8)]
    results = [backend.run(batch).dense for batch in batches]
    for batch, vectors in zip(batches, results, strict=True):
        np.testing.assert_allclose(vectors, expected(graph, batch), rtol=1e-4, atol=1e-5)


# --- micro-batches and requests ---------------------------------------------------------------------------------


class RecordingModel:
    """A compiled graph that records the shapes of its inputs."""

    def __init__(self, model: Any, shapes: list[tuple[int, int]]) -> None:
        self._model, self._shapes = model, shapes

    def create_infer_request(self) -> RecordingModel:
        return RecordingModel(self._model.create_infer_request(), self._shapes)

    def infer(self, inputs: dict[str, Any], **options: bool) -> Any:
        self._shapes.append(inputs["input_ids"].shape)
        return self._model.infer(inputs, **options)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return the shapes of all inputs that backends loaded by the test run with one stream."""
    recorded: list[tuple[int, int]] = []

    def compile_recording(*arguments: Any) -> Compiled:
        compiled = compile_streams(*arguments)
        return compiled._replace(streams=RecordingModel(compiled.streams, recorded))

    monkeypatch.setattr("emb_model_provider.backends.openvino_cpu.backend.compile_streams", compile_recording)
    return recorded


def test_a_batch_runs_in_micro_batches(graph: Path, shapes: list[tuple[int, int]]) -> None:
    """Their padded tokens are bounded, and lengths above 64 are multiples of 8."""
    backend = OpenVinoBackend(graph, description(max_length=3000), cpus=1)
    batch = random_batch(np.random.default_rng(5), 100, 200)
    long = TokenBatch(ids=[*batch.ids, [1] * 2500], prompt_lengths=[*batch.prompt_lengths, 0])
    np.testing.assert_allclose(backend.run(long).dense, expected(graph, long), rtol=1e-4, atol=1e-5)
    assert len(shapes) > 5
    assert sum(rows for rows, _ in shapes) == 101
    assert all(rows * length <= MICRO_BATCH_TOKENS or rows == 1 for rows, length in shapes)
    assert all(length <= 64 or length % 8 == 0 for _, length in shapes)


def test_a_length_is_not_rounded_up_beyond_the_maximum(graph: Path, shapes: list[tuple[int, int]]) -> None:
    """A model with 70 positions gets 70 tokens, and not 72."""
    backend = OpenVinoBackend(graph, description(max_length=70), cpus=1)
    for length in (64, 65, 69, 70):
        backend.run(TokenBatch(ids=[[1] * length], prompt_lengths=[0]))
    assert shapes == [(1, 64), (1, 70), (1, 70), (1, 70)]


def test_a_lone_short_input_is_padded(graph: Path, shapes: list[tuple[int, int]]) -> None:
    """Because OpenVINO prepares the graph again when the shape changes."""
    backend = OpenVinoBackend(graph, description(max_length=30), cpus=1)
    for length in (1, 9, 16, 17, 30):
        backend.run(TokenBatch(ids=[[1] * length], prompt_lengths=[0]))
    backend.run(TokenBatch(ids=[[1] * 9, [1] * 9], prompt_lengths=[0, 0]))
    assert shapes == [(1, 16), (1, 16), (1, 16), (1, 30), (1, 30), (2, 9)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cpus", [1, 2])
def test_a_graph_of_a_fixed_shape_runs_short_inputs(
    side: str, cpus: int, graph: Path, shapes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some of them, without a change of their vectors."""
    started: list[threading.Thread] = []
    start = infer_requests.start_thread
    monkeypatch.setattr(infer_requests, "start_thread", lambda thread: (started.append(thread), start(thread)))
    backend = OpenVinoBackend(graph, description(padding_side=side), cpus=cpus)
    batch = random_batch(np.random.default_rng(5), 1, 16)
    vectors = []
    for _ in range(3 * _USES_BEFORE_COMPILING):
        vectors.append(backend.run(batch).dense)
        for thread in started:
            thread.join(30)
    assert len(started) == 1
    np.testing.assert_allclose(
        np.concatenate(vectors), np.tile(expected(graph, batch), (len(vectors), 1)), rtol=1e-4, atol=1e-5
    )
    if cpus == 1:
        assert len(shapes) < len(vectors)
    backend.close()


def test_short_inputs_run_without_a_graph_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    """If OpenVINO cannot compile it, which is logged once."""
    failed = threading.Event()

    def fail(length: int) -> Any:
        failed.set()
        raise RuntimeError("no memory")

    short = ShortRequests(fail, lambda *_: True, 512, BackgroundCompiler())
    pool = RequestPool(["first", "second"], latency(), short)
    for _ in range(3 * _USES_BEFORE_COMPILING):
        with pool.acquire(1, 5) as acquired:
            assert acquired == ("latency", 16)
    pool.close()
    assert failed.is_set()
    assert caplog.text.count("no memory") == 1


def test_a_graph_of_a_fixed_shape_with_other_results_is_not_used(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO does not compute each graph right."""
    monkeypatch.setattr(infer_requests, "_USES_BEFORE_COMPILING", 1)
    other: list[Any] = []

    def compile_other(*arguments: Any) -> Compiled:
        compiled = compile_streams(*arguments)

        def compile_length(length: int) -> Any:
            other.append(OtherRequest(compiled.compile_length(length)))
            return other[0]

        return compiled._replace(compile_length=compile_length)

    monkeypatch.setattr("emb_model_provider.backends.openvino_cpu.backend.compile_streams", compile_other)
    backend = OpenVinoBackend(graph, description(), cpus=2)
    batch = random_batch(np.random.default_rng(5), 1, 16)
    backend.run(batch)
    for thread in backend._requests._short._background._threads:  # type: ignore[union-attr]  # it has such requests
        thread.join(30)
    np.testing.assert_allclose(backend.run(batch).dense, expected(graph, batch), rtol=1e-4, atol=1e-5)
    assert other[0].runs == 1
    backend.close()


def test_a_graph_of_a_fixed_shape_is_compared_by_a_request_that_has_run_shorter_inputs(graph: Path) -> None:
    backend = OpenVinoBackend(graph, description(), cpus=1)
    backend.run(TokenBatch(ids=[[1], [1]], prompt_lengths=[0, 0]))
    short = backend._requests._short
    assert short is not None
    short._compile(16)
    assert 16 in short._requests
    backend.close()


def test_comparing_a_graph_of_a_fixed_shape_changes_no_inputs_of_requests(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests keep pointers to them, and their memory may belong to something else by then."""
    made: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def pad_and_record(*arguments: Any) -> dict[str, Any]:
        inputs = pad_inputs(*arguments)
        made.append((inputs, {name: values.copy() for name, values in inputs.items()}))
        return inputs

    monkeypatch.setattr("emb_model_provider.backends.openvino_cpu.backend.pad_inputs", pad_and_record)
    backend = OpenVinoBackend(graph, description(), cpus=1)
    batch = random_batch(np.random.default_rng(5), 1, 16)
    backend.run(batch)
    short = backend._requests._short
    assert short is not None
    short._compile(16)
    backend.close()
    assert len(made) > 2
    for inputs, copies in made:
        for name, values in inputs.items():
            np.testing.assert_array_equal(values, copies[name])


class OtherRequest:
    """An infer request whose results are changed."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self.runs = 0

    def infer(self, inputs: Any, **options: Any) -> dict[int, NDArray[np.float32]]:
        self.runs += 1
        return {0: np.roll(self._request.infer(inputs, **options)[0], 1, axis=1)}


def test_a_short_input_beside_another_batch_gets_a_stream() -> None:
    short = ShortRequests(lambda length: f"length {length}", lambda *_: True, 512, BackgroundCompiler())
    for length in (16, 32):
        short._compile(length)
    pool = RequestPool(["first", "second"], latency(), short)
    with pool.acquire(1, 17) as lone:
        assert lone == ("length 32", 32)
        with pool.acquire(1, 17) as concurrent:
            assert concurrent == ("second", 17)
    for rows, length in ((2, 5), (1, 33)):
        with pool.acquire(rows, length) as acquired:
            assert acquired == ("latency", length)


def latency() -> LatencyRequest:
    """Return one that is compiled."""
    return LatencyRequest(lambda: "latency", None)


def test_the_latency_request_is_compiled_after_some_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of lone batches. A stream runs these meanwhile."""
    started: list[threading.Thread] = []
    start = infer_requests.start_thread
    monkeypatch.setattr(infer_requests, "start_thread", lambda thread: (started.append(thread), start(thread)))
    pool = RequestPool(["first", "second"], LatencyRequest(lambda: "latency", BackgroundCompiler()))
    with pool.acquire(4, LATENCY_TOKENS // 8) as lone:
        assert lone[0] == "second"
        with pool.acquire(64, LATENCY_TOKENS) as concurrent:
            assert concurrent[0] == "first"
    assert not started
    with pool.acquire(4, LATENCY_TOKENS // 8):
        pass
    started[0].join(30)
    with pool.acquire(1, 5) as lone:
        assert lone[0] == "latency"
    assert len(started) == 1
    pool.close()


def test_a_lone_batch_runs_without_the_latency_request(caplog: pytest.LogCaptureFixture) -> None:
    """If OpenVINO cannot compile it, which is logged once."""

    def fail() -> Any:
        raise RuntimeError("no memory")

    background = BackgroundCompiler()
    pool = RequestPool(["only"], LatencyRequest(fail, background))
    for _ in range(3):
        with pool.acquire(1, LATENCY_TOKENS) as lone:
            assert lone[0] == "only"
        for thread in background._threads:
            thread.join(30)
    assert caplog.text.count("no memory") == 1


def test_a_lone_batch_gets_the_latency_request() -> None:
    """A batch that starts while another one runs gets a stream, also if the latency request is free again."""
    pool = RequestPool(["first", "second"], latency())
    with pool.acquire(2, 5) as lone:
        assert lone == ("latency", 5)
        with pool.acquire(2, 5) as concurrent:
            assert concurrent == ("second", 5)
    with pool.acquire(2, 5) as next_lone:
        assert next_lone == ("latency", 5)


def test_the_request_that_was_used_last_is_used_first() -> None:
    """Without a latency request; its buffers are in the caches of the processor."""
    pool = RequestPool(["first", "second"])
    for _ in range(2):
        with pool.acquire(2, 5) as (request, _):
            assert request == "second"


def test_further_batches_wait_for_a_request() -> None:
    pool = RequestPool(["only"])
    waiting = threading.Event()

    def acquire() -> Any:
        waiting.set()
        with pool.acquire(2, 5) as (request, _):
            return request

    with ThreadPoolExecutor(1) as executor, pool.acquire(2, 5):
        second = executor.submit(acquire)
        waiting.wait(10)
        assert not second.done()
    assert second.result(10) == "only"


def test_a_closed_pool_raises() -> None:
    """A batch that is running when the model is closed must not wait forever for its next micro-batch."""
    pool = RequestPool(["only"], latency())
    with pool.acquire(2, 5):
        pool.close()
    with pytest.raises(RuntimeError, match="closed"), pool.acquire(2, 5):
        pass


# --- errors, fp32, closing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[[5, WORDS]], [[-1, 5]], [[5] * 101]])
def test_invalid_tokens_are_an_error(ids: list[list[int]], graph: Path) -> None:
    """Ids or lengths that the model does not support; the next batch is answered."""
    backend = OpenVinoBackend(graph, description(), cpus=1)
    with pytest.raises(InferenceError):
        backend.run(TokenBatch(ids=ids, prompt_lengths=[0]))
    assert backend.run(TokenBatch(ids=[[5]], prompt_lengths=[0])).dense.shape == (1, WIDTH)


def test_embed_fp32_of_a_model_at_bf16(tmp_path: Path) -> None:
    """It is not rounded to bf16, and `embed` is unchanged afterwards."""
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
    rounded = backend.run(batch).dense
    np.testing.assert_allclose(backend.run_fp32(batch).dense, exact, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(backend.run(batch).dense, rounded)
    if native_bf16():
        assert np.abs(rounded - exact).max() > 1e-3
    with pytest.raises(InferenceError):
        backend.run_fp32(TokenBatch(ids=[[WORDS]], prompt_lengths=[0]))


def test_a_closed_backend_raises(graph: Path) -> None:
    """`on_close` is called once."""
    closed: list[bool] = []
    backend = OpenVinoBackend(graph, description(), cpus=2, on_close=lambda: closed.append(True))
    backend.close()
    backend.close()
    assert closed == [True]
    with pytest.raises(RuntimeError, match="closed"):
        backend.run(TokenBatch(ids=[[5]], prompt_lengths=[0]))


def test_an_invalid_graph_is_an_error(tmp_path: Path) -> None:
    """The message names the file, and says what to do."""
    (tmp_path / "model.xml").write_text("<net>")
    with pytest.raises(LoadError, match=r"model\.xml.*EMB_PROVIDER_BACKEND=torch"):
        OpenVinoBackend(tmp_path / "model.xml", description(), cpus=1)
