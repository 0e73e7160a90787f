"""The OpenVINO backend: token batches through a compiled graph on the CPU. Imports no torch.

Memory is bounded whatever comes in. A batch is run in parts of at most 2,048 padded tokens, which is no slower
than larger ones (7,430 tokens a second against 7,400 at 4,096 and 7,470 at 16,384) and needs a fraction of the
memory (390, 600 and 950 MB in the whole process); parts hold neighbours in length, and are as many as pays (see
`split_batch.py`): 64 short texts are answered a tenth quicker than in one piece. Lengths beyond 64 are rounded up to a multiple of 8: that costs nothing measurable, and there are fewer
shapes, for each of which the runtime keeps kernels. Shorter ones are not: 13 tokens as 16 are 13 % slower.
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
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import ModelDescription, TokenBatch


class OpenVinoBackend:
    """A compiled graph. Up to `streams` threads may call `embed` at a time; more of them wait."""

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
        """Read `graph` (an OpenVINO `.xml` beside its `.bin`) and compile it for this processor.

        It computes in `description.compute`, else in `description.precision`: fp32, bf16, or, where weights are
        integers, int8 (see `openvino_runtime`). `cpus` is how many processors to use
        (by default as many as this process may); `on_close` is called once, when the backend is closed.

        Raises: LoadError.
        """
        self.description = description
        layout = stream_layout(usable_cpus() if cpus is None else cpus)
        self.streams = layout.streams
        computes = description.compute or description.precision
        compiled = compile_streams(graph, computes, layout)
        self.memory_bytes = openvino_bytes(
            graph.with_suffix(".bin").stat().st_size,
            compiled.matrix_items,
            compiled.unpacked_bytes,
            computes,
            description,
        )
        # The last one given back is taken first: its buffers are the warmest, and unused ones are never allocated.
        self._requests: queue.LifoQueue[Any] = queue.LifoQueue()
        for _ in range(layout.streams):
            self._requests.put(compiled.streams.create_infer_request())
        self._latency_request = (
            compiled.latency_model.create_infer_request() if compiled.latency_model is not None else None
        )
        self._wide_is_free = compiled.latency_model is not None
        self._running = 0
        self._state = threading.Lock()
        self._graph = graph
        self._fp32: Any = None
        self._fp32_lock = threading.Lock()
        self._on_close = on_close
        self._closed = False

    def embed(self, batch: TokenBatch) -> NDArray[np.float32]:
        """Return float32 vectors of shape (inputs, dimension), before a final length normalization.

        Raises: InferenceError where a row is longer than the model reads or holds an id it does not know; else
        whatever OpenVINO raises. The backend stays usable.
        """
        return self._embed(batch, self._request)

    def embed_fp32(self, batch: TokenBatch) -> NDArray[np.float32]:
        """Return the same vectors computed at fp32, from weights as the artifact has them.

        The first call compiles the graph once more, on one thread. Raises what `embed` raises.
        """
        return self._embed(batch, self._fp32_request)

    def close(self) -> None:
        """Free the model's memory. The backend is not used again."""
        if not self._closed:
            self._closed = True
            self._requests = queue.LifoQueue()
            self._latency_request, self._wide_is_free = None, False
            self._fp32 = None
            self._on_close()

    def _embed(
        self, batch: TokenBatch, lend: Callable[[], AbstractContextManager[Any]]
    ) -> NDArray[np.float32]:
        if self._closed:
            raise RuntimeError("the backend is closed")
        self._check(batch)
        vectors = np.empty((len(batch.ids), self.description.dimension), dtype=np.float32)
        for rows, length in split_batch([len(row) for row in batch.ids], self.description.max_length):
            inputs = self._inputs(batch, rows, length)
            with lend() as request:
                # The result lies in the request's own memory, so it is copied before anybody else runs it.
                vectors[rows] = request.infer(inputs, share_inputs=True, share_outputs=True)[0]
        return vectors

    def _check(self, batch: TokenBatch) -> None:
        """Refuse what the graph would read beyond its tables for."""
        longest = max(map(len, batch.ids))
        if longest > self.description.max_length:
            raise InferenceError(
                f"An input of {longest} tokens reached a model that reads {self.description.max_length}."
            )
        lowest, highest = min(map(min, batch.ids)), max(map(max, batch.ids))
        if lowest < 0 or highest >= self.description.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise InferenceError(
                f"An input holds token id {wrong}; the model knows 0 to {self.description.vocab_size - 1}."
            )

    def _inputs(self, batch: TokenBatch, rows: Sequence[int], length: int) -> dict[str, NDArray[np.int64]]:
        own = [batch.ids[row] for row in rows]
        shape = len(own), length
        ids = np.full(shape, self.description.pad_token_id, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        starts = [shape[1] - len(row) if self.description.padding_side == "left" else 0 for row in own]
        for i, (row, start) in enumerate(zip(own, starts, strict=True)):
            ids[i, start : start + len(row)] = row
            mask[i, start : start + len(row)] = 1
        inputs = {INPUT_IDS: ids, ATTENTION_MASK: mask}
        if self.description.excludes_prompt:
            pooled = mask.copy()
            for i, (place, start) in enumerate(zip(rows, starts, strict=True)):
                pooled[i, start : start + batch.prompt_lengths[place]] = 0
            inputs[POOLING_MASK] = pooled
        return inputs

    @contextmanager
    def _fp32_request(self) -> Iterator[Any]:
        """Lend the one request that computes at fp32, made when it is first wanted."""
        with self._fp32_lock:
            if self._fp32 is None:
                compiled = compile_streams(self._graph, "fp32", StreamLayout(streams=1, threads=1))
                self._fp32 = compiled.streams.create_infer_request()
            yield self._fp32

    @contextmanager
    def _request(self) -> Iterator[Any]:
        """Lend a request: the wide lane while nothing else runs, else one of the others, when one is free."""
        with self._state:
            wide = self._wide_is_free and not self._running
            self._running += 1
            self._wide_is_free &= not wide
        try:
            if wide:
                yield self._latency_request
                return
            requests = self._requests
            request = requests.get()
            try:
                yield request
            finally:
                requests.put(request)
        finally:
            with self._state:
                self._running -= 1
                self._wide_is_free |= wide and not self._closed


MICRO_BATCH_TOKENS = 2048
"""Padded tokens of a part at most: no slower than larger parts, and a fraction of their memory."""
_MICRO_BATCH_ROWS = 64
"""Rows of a part at most: from 32 on, more of them answer no more texts a second."""
_MICRO_BATCH_COST = 24
"""What it costs to run one more part, in padded tokens."""
_EXACT_LENGTHS = 64
_LENGTH_STEP = 8


def split_batch(lengths: Sequence[int], longest: int) -> Iterator[tuple[list[int], int]]:
    """Yield the rows of each part and the length that they are padded to, the longest rows first.

    `lengths` are the tokens of each row and `longest` the most that the model reads. The parts are those that
    cost least in all: their padded tokens and their number are weighed against each other.
    """
    rows = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    padded = [bucket_length(lengths[row], longest) for row in rows]
    sizes = _sizes(padded)
    start = 0
    while start < len(rows):
        yield rows[start : start + sizes[start]], padded[start]
        start += sizes[start]


def bucket_length(length: int, longest: int) -> int:
    """Return the length that a part is padded to, so that there are not too many shapes."""
    if length <= _EXACT_LENGTHS:
        return length
    return min(-(-length // _LENGTH_STEP) * _LENGTH_STEP, max(length, longest))


def _sizes(padded: Sequence[int]) -> list[int]:
    """Return, for each row, how many rows the part has that would begin with it. `padded` descends."""
    total = len(padded)
    cost = [0] * (total + 1)  # of all rows from here on
    sizes = [1] * total
    for start in range(total - 1, -1, -1):
        length = padded[start]
        most = min(total - start, _MICRO_BATCH_ROWS, max(1, MICRO_BATCH_TOKENS // length))
        best = cost[start + 1] + length
        for size in range(2, most + 1):
            candidate = cost[start + size] + size * length
            if candidate < best:
                best, sizes[start] = candidate, size
        cost[start] = best + _MICRO_BATCH_COST
    return sizes
