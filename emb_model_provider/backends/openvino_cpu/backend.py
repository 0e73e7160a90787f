"""The OpenVINO backend: runs batches of tokens through a compiled graph on the CPU. It does not import torch.

Memory is bounded, because a batch is split into micro-batches of at most 2,048 padded tokens, which are as fast as
larger ones. They contain inputs of similar length. Lengths above 64 are rounded up to a multiple of 8, because the
runtime keeps kernels for each shape (see docs/performance.md).
"""

from __future__ import annotations

import queue
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from emb_model_provider.backends.hardware import usable_cpus
from emb_model_provider.backends.memory_estimate import openvino_bytes
from emb_model_provider.backends.openvino_cpu.runtime import (
    ATTENTION_MASK,
    INPUT_IDS,
    POOLING_MASK,
    StreamLayout,
    compile_streams,
    stream_layout,
)
from emb_model_provider.errors import InferenceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import ModelDescription, TokenBatch

MICRO_BATCH_TOKENS = 2048
"""Largest number of padded tokens of a micro-batch with several rows."""
MICRO_BATCH_ROWS = 64
"""Largest number of rows of a micro-batch. From 32 rows on, more rows do not increase throughput."""
MICRO_BATCH_COST = 24
"""Fixed cost of running a micro-batch, in padded tokens."""
_EXACT_LENGTHS = 64
"""Up to this length lengths are not rounded up, because padding 13 tokens to 16 makes them 13 % slower."""
_LENGTH_STEP = 8


class OpenVinoBackend:
    """A compiled graph. Up to `streams` threads run `embed` at the same time; further threads wait."""

    description: ModelDescription
    streams: int
    memory_bytes: int

    def __init__(
        self,
        graph: Path,
        description: ModelDescription,
        *,
        cpus: int | None = None,
        on_close: Callable[[], object] = lambda: None,
    ) -> None:
        """Read a graph and compile it for this processor.

        Args:
            graph: An OpenVINO `.xml` file with its `.bin` file next to it.
            description: The description of the model. The graph computes in its `compute` or else its `precision`,
                which must be fp32, bf16 or, for integer weights, int8.
            cpus: Number of processors to use; None for all that this process can use.
            on_close: Called once, when the backend is closed.

        Raises:
            LoadError: The graph cannot be read or compiled.
        """
        self.description = description
        layout = stream_layout(usable_cpus() if cpus is None else cpus)
        self.streams = layout.streams
        compute = description.compute or description.precision
        compiled = compile_streams(graph, compute, layout)
        self.memory_bytes = openvino_bytes(
            graph.with_suffix(".bin").stat().st_size,
            compiled.matrix_items,
            compiled.dequantized_bytes,
            compute,
            description,
        )
        self._requests = RequestPool(
            (compiled.streams.create_infer_request() for _ in range(layout.streams)),
            compiled.latency_model.create_infer_request() if compiled.latency_model is not None else None,
        )
        self._graph = graph
        self._fp32_request: Any = None
        self._fp32_lock = threading.Lock()
        self._on_close = on_close
        self._closed = False

    def embed(self, batch: TokenBatch) -> NDArray[np.float32]:
        """Return float32 vectors of shape (inputs, dimension), before a final length normalization.

        Raises:
            InferenceError: An input is longer than the model supports, or has an id that the model does not have.
        """
        return self._embed(batch, self._requests.acquire)

    def embed_fp32(self, batch: TokenBatch) -> NDArray[np.float32]:
        """Return the same vectors, computed at fp32 from the stored weights on one thread.

        The first call compiles the graph again.

        Raises:
            InferenceError: An input is longer than the model supports, or has an id that the model does not have.
        """
        return self._embed(batch, self._acquire_fp32)

    def close(self) -> None:
        """Free the memory of the model. The backend cannot be used afterwards."""
        if not self._closed:
            self._closed = True
            self._requests.close()
            self._fp32_request = None
            self._on_close()

    def _embed(self, batch: TokenBatch, acquire: Callable[[], AbstractContextManager[Any]]) -> NDArray[np.float32]:
        if self._closed:
            raise RuntimeError("the backend is closed")
        self._check(batch)
        vectors = np.empty((len(batch.ids), self.description.dimension), dtype=np.float32)
        for rows, length in split_batch([len(row) for row in batch.ids], self.description.max_length):
            inputs = self._inputs(batch, rows, length)
            with acquire() as request:
                # The result is in the memory of the request, so it is copied before the request runs again.
                vectors[rows] = request.infer(inputs, share_inputs=True, share_outputs=True)[0]
        return vectors

    def _check(self, batch: TokenBatch) -> None:
        """Reject inputs for which the graph would read beyond its tables."""
        longest = max(map(len, batch.ids))
        if longest > self.description.max_length:
            raise InferenceError(f"An input has {longest} tokens; the model supports {self.description.max_length}.")
        lowest, highest = min(map(min, batch.ids)), max(map(max, batch.ids))
        if lowest < 0 or highest >= self.description.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise InferenceError(
                f"An input has the token id {wrong}; the model has 0 to {self.description.vocab_size - 1}."
            )

    def _inputs(self, batch: TokenBatch, rows: Sequence[int], length: int) -> dict[str, NDArray[np.int64]]:
        shape = len(rows), length
        ids = np.full(shape, self.description.pad_token_id, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        pooled = np.zeros(shape, dtype=np.int64)
        for i, row in enumerate(rows):
            tokens = batch.ids[row]
            start = length - len(tokens) if self.description.padding_side == "left" else 0
            end = start + len(tokens)
            ids[i, start:end] = tokens
            mask[i, start:end] = 1
            if self.description.excludes_prompt:
                pooled[i, start + batch.prompt_lengths[row] : end] = 1
        inputs = {INPUT_IDS: ids, ATTENTION_MASK: mask}
        if self.description.excludes_prompt:
            inputs[POOLING_MASK] = pooled
        return inputs

    @contextmanager
    def _acquire_fp32(self) -> Iterator[Any]:
        with self._fp32_lock:
            if self._fp32_request is None:
                compiled = compile_streams(self._graph, "fp32", StreamLayout(streams=1, threads=1))
                self._fp32_request = compiled.streams.create_infer_request()
            yield self._fp32_request


class RequestPool:
    """The infer requests of a model: one per stream, and perhaps one that uses all threads for a lone batch."""

    def __init__(self, requests: Iterable[Any], latency_request: Any | None = None) -> None:
        # The request that was returned last is taken first: its buffers are in the processor's caches, and the buffers
        # of requests that are not needed are never allocated.
        self._requests: queue.LifoQueue[Any] = queue.LifoQueue()
        for request in requests:
            self._requests.put(request)
        self._latency_request = latency_request
        self._latency_is_free = latency_request is not None
        self._running = 0
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def acquire(self) -> Iterator[Any]:
        """Wait for a request: the latency request while no other one is in use, else one of the streams."""
        with self._lock:
            is_lone = self._latency_is_free and not self._running
            self._running += 1
            self._latency_is_free &= not is_lone
        try:
            if is_lone:
                yield self._latency_request
                return
            requests = self._requests
            request = requests.get()
            try:
                yield request
            finally:
                requests.put(request)
        finally:
            with self._lock:
                self._running -= 1
                self._latency_is_free |= is_lone and not self._closed

    def close(self) -> None:
        """Release the requests. Those in use are freed when they are returned."""
        self._closed = True
        self._requests = queue.LifoQueue()
        self._latency_request, self._latency_is_free = None, False


def split_batch(lengths: Sequence[int], longest: int) -> Iterator[tuple[list[int], int]]:
    """Split a batch into the micro-batches that cost least in total, in padded tokens and in number.

    Args:
        lengths: Number of tokens of each row.
        longest: Number of tokens that the model supports.

    Yields:
        The rows of a micro-batch, and the length that they are padded to; the longest rows first.
    """
    rows = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    padded = [bucket_length(lengths[row], longest) for row in rows]
    sizes = _micro_batch_sizes(padded)
    start = 0
    while start < len(rows):
        yield rows[start : start + sizes[start]], padded[start]
        start += sizes[start]


def bucket_length(length: int, longest: int) -> int:
    """Return the length that a micro-batch is padded to, which bounds the number of shapes.

    Args:
        length: Number of tokens of its longest row.
        longest: Number of tokens that the model supports.
    """
    if length <= _EXACT_LENGTHS:
        return length
    return min(-(-length // _LENGTH_STEP) * _LENGTH_STEP, max(length, longest))


def _micro_batch_sizes(padded: Sequence[int]) -> list[int]:
    """Return, for each row, the best size of a micro-batch that begins with it; `padded` descends."""
    total = len(padded)
    cost = [0] * (total + 1)  # of all rows from this one on
    sizes = [1] * total
    for start in range(total - 1, -1, -1):
        length = padded[start]
        largest = min(total - start, MICRO_BATCH_ROWS, max(1, MICRO_BATCH_TOKENS // length))
        best = cost[start + 1] + length
        for size in range(2, largest + 1):
            candidate = cost[start + size] + size * length
            if candidate < best:
                best, sizes[start] = candidate, size
        cost[start] = best + MICRO_BATCH_COST
    return sizes
