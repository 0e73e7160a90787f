"""The OpenVINO backend: runs batches of tokens through a compiled graph on the CPU. It does not import torch.

Batches are split into micro-batches of inputs of similar length, which bound the memory and are as fast as larger ones.
Long inputs are padded to a multiple of 8, because the runtime keeps kernels for each shape (see docs/performance.md).
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from emb_model_provider.backends.arrays import OutputBuilder, pad_inputs
from emb_model_provider.backends.base import TERM_WEIGHTS, TokenBatch, check_ids, check_lengths
from emb_model_provider.backends.hardware import usable_cpus
from emb_model_provider.backends.memory_estimate import matrix_bytes, openvino_bytes
from emb_model_provider.backends.openvino_cpu.infer_requests import (
    SHORT_LENGTHS,
    BackgroundCompiler,
    LatencyRequest,
    RequestPool,
    ShortRequests,
)
from emb_model_provider.backends.openvino_cpu.runtime import StreamLayout, compile_streams, release_pages, stream_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from emb_model_provider.backends.base import ModelDescription, Outputs

MICRO_BATCH_TOKENS = 2048
"""Largest number of padded tokens of a micro-batch with several rows."""
_MOST_TERM_WEIGHTS = 16_000_000
"""Largest number of weights that a sparse model computes at a time, one per token and word of its vocabulary: 64 MB."""
MICRO_BATCH_ROWS = 64
"""Largest number of rows of a micro-batch. From 32 rows on, more rows do not increase throughput."""
MICRO_BATCH_COST = 24
"""Fixed cost of running a micro-batch, in padded tokens."""
_MOST_SHORT_BYTES = 64 * 2**20
"""Largest copy of the matrices that requests for short inputs have. For a larger model they gain less."""
_MOST_DIFFERENCE = 0.03
"""Largest norm of a difference, relative to the norm, that is taken for rounding at bf16."""
_EXACT_LENGTHS = 64
"""Up to this length lengths are not rounded up, because padding 13 tokens to 16 makes them 13 % slower."""
_LENGTH_STEP = 8


class OpenVinoBackend:
    """A compiled graph. Up to `streams` threads call `run` at the same time; further threads wait."""

    def __init__(
        self,
        graph: Path,
        description: ModelDescription,
        *,
        cpus: int | None = None,
        compiles_latency: bool = False,
        on_close: Callable[[], object] = lambda: None,
    ) -> None:
        """Read a graph and compile it for this processor.

        Args:
            graph: An OpenVINO `.xml` file with its `.bin` file next to it.
            description: The graph computes in its `compute` or else its `precision`: fp32, bf16 or, for integer
                weights, int8.
            cpus: Number of processors to use; None for all that this process can use.
            compiles_latency: Whether the request for lone batches is compiled at once; see `LatencyRequest`.
            on_close: Called once, when the backend is closed.

        Raises:
            LoadError: The graph cannot be read or compiled.
        """
        self.description = description
        tuning = description.tuning
        layout = stream_layout(usable_cpus() if cpus is None else cpus, tuning.streams)
        self.streams = layout.streams
        compute = description.compute or description.precision
        compiled = compile_streams(graph, compute, layout, tuning, description.activation_group)
        stored = graph.with_suffix(".bin").stat().st_size
        background = BackgroundCompiler()
        latency = short = None
        if layout.has_latency_request:
            latency = LatencyRequest(compiled.compile_latency, None if compiles_latency else background)
        if matrix_bytes(compiled.matrix_items, compute) <= _MOST_SHORT_BYTES:
            short = ShortRequests(compiled.compile_length, self._is_equal, description.max_length, background)
        self.memory_bytes = openvino_bytes(
            stored, compiled.matrix_items, compiled.dequantized_bytes, compute, description,
            short_lengths=len(SHORT_LENGTHS) if short is not None else 0,
        )  # fmt: skip
        self._requests = RequestPool(
            (compiled.streams.create_infer_request() for _ in range(layout.streams)), latency, short
        )
        self._graph = graph
        self._fp32_request: Any = None
        self._fp32_lock = threading.Lock()
        self._on_close = on_close
        self._has_run = False
        self._closed = False

    def run(self, batch: TokenBatch) -> Outputs:
        outputs = self._run(batch, self._requests.acquire)
        if not self._has_run:
            self._has_run = True
            release_pages(self._graph.with_suffix(".bin"))
        return outputs

    def run_fp32(self, batch: TokenBatch) -> Outputs:
        """Compute at fp32 from the stored weights, on one thread. The first call compiles the graph again."""
        return self._run(batch, self._acquire_fp32)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._requests.close()
            self._fp32_request = None
            self._on_close()

    def _run(
        self, batch: TokenBatch, acquire: Callable[[int, int], AbstractContextManager[tuple[Any, int]]]
    ) -> Outputs:
        if self._closed:
            raise RuntimeError("the backend is closed")
        description = self.description
        check_lengths(batch, description.max_length)
        check_ids(np.concatenate(batch.ids), description.vocab_size)
        builder = OutputBuilder(batch, description)
        lengths = [len(row) for row in batch.ids]
        for rows, length in split_batch(lengths, description.max_length, most_tokens=micro_batch_tokens(description)):
            with acquire(len(rows), length) as (request, padded):
                inputs = pad_inputs(batch, rows, padded, description)
                results = request.infer(inputs, share_inputs=True, share_outputs=True)
                # The results are in the memory of the request, so they are copied before the request runs again.
                builder.add(rows, {name: results[index] for index, name in enumerate(description.arrays)})
        return builder.build()

    def _is_equal(self, request: Any, length: int) -> bool:
        """Return whether a request for one input of a length has the results of the graph for all shapes.

        OpenVINO 2026.4.1 computes other vectors with a fixed shape if a Qwen3 model pads at the right and pools the last token.
        """
        ids = np.random.default_rng(0).integers(0, self.description.vocab_size, length).tolist()
        for count in sorted({1, length // 3, 2 * length // 3, length - 1, length} - {0}):
            batch = TokenBatch(ids=[ids[:count]], prompt_lengths=[0])
            inputs = pad_inputs(batch, [0], length, self.description)
            # Shared, because OpenVINO would copy these inputs to the address of those of the previous batch, which are freed,
            # or fail if these are longer.
            fixed = [np.array(values) for values in request.infer(inputs, share_inputs=True).values()]
            with self._requests.acquire(2, length) as (reference, _):
                results = [np.array(values) for values in reference.infer(inputs, share_inputs=True).values()]
            for ours, expected in zip(fixed, results, strict=True):
                if not np.linalg.norm(ours - expected) <= _MOST_DIFFERENCE * np.linalg.norm(expected):
                    return False
        return True

    @contextmanager
    def _acquire_fp32(self, _rows: int, length: int) -> Iterator[tuple[Any, int]]:
        with self._fp32_lock:
            if self._fp32_request is None:
                compiled = compile_streams(
                    self._graph, "fp32", StreamLayout(streams=1, threads=1), self.description.tuning
                )
                self._fp32_request = compiled.streams.create_infer_request()
            yield self._fp32_request, length


def micro_batch_tokens(description: ModelDescription) -> int:
    """Return the largest number of padded tokens of a micro-batch with several rows."""
    if TERM_WEIGHTS not in description.arrays:
        return MICRO_BATCH_TOKENS
    return min(MICRO_BATCH_TOKENS, _MOST_TERM_WEIGHTS // description.dimension)


def split_batch(
    lengths: Sequence[int], longest: int, most_tokens: int = MICRO_BATCH_TOKENS
) -> Iterator[tuple[list[int], int]]:
    """Split rows into the micro-batches that cost least in total.

    Args:
        lengths: The lengths of the rows in tokens.
        longest: Longest input of the model.
        most_tokens: Largest number of padded tokens of a micro-batch with several rows.

    Yields:
        The rows of a micro-batch, and the length that they are padded to; the longest rows first.
    """
    rows = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    padded = [bucket_length(lengths[row], longest) for row in rows]
    sizes = _micro_batch_sizes(padded, most_tokens)
    start = 0
    while start < len(rows):
        yield rows[start : start + sizes[start]], padded[start]
        start += sizes[start]


def bucket_length(length: int, longest: int) -> int:
    """Return the length that a micro-batch is padded to, which bounds the number of shapes."""
    if length <= _EXACT_LENGTHS:
        return length
    return min(-(-length // _LENGTH_STEP) * _LENGTH_STEP, max(length, longest))


def _micro_batch_sizes(padded: Sequence[int], most_tokens: int) -> list[int]:
    """Return, for each row, the best size of a micro-batch that begins with it; `padded` descends."""
    total = len(padded)
    cost = [0] * (total + 1)  # of all rows from this one on
    sizes = [1] * total
    for start in range(total - 1, -1, -1):
        length = padded[start]
        largest = min(total - start, MICRO_BATCH_ROWS, max(1, most_tokens // length))
        best = cost[start + 1] + length
        for size in range(2, largest + 1):
            candidate = cost[start + size] + size * length
            if candidate < best:
                best, sizes[start] = candidate, size
        cost[start] = best + MICRO_BATCH_COST
    return sizes
