"""OpenVINO on this processor: its import, how a graph is compiled, and how many batches run side by side.

Measured with all-MiniLM-L6-v2 at bf16 on two cores of a Zen 4 (AVX512-BF16, no AMX): texts a second with as
many callers as streams, and milliseconds for a lone caller, best of 15 interleaved windows.

    inputs x tokens     1 stream of 2 threads    2 streams of 1 thread
     1 x 13                589/s     1.7 ms          677/s     2.7 ms
     8 x 13               1017/s     7.8 ms         1154/s    13.8 ms
    32 x 13               1173/s    27.8 ms         1248/s    50.5 ms
    64 x 13               1199/s    53.5 ms         1251/s    99.2 ms
     1 x 92                135/s     7.1 ms          159/s    12.8 ms
     8 x 92                162/s    49.5 ms          172/s    91.4 ms
    32 x 92                171/s     190 ms          165/s     368 ms
    64 x 92                163/s     384 ms          166/s     750 ms

So one thread a stream answers more, most of all in small batches, and all threads on one batch answer a lone
caller in little more than half the time. Both are had: the same graph is compiled twice, which costs 30 MB,
since the two share their weights. Other options that were tried, and left as they are by default: without fused
attention (SNIPPETS_MODE=DISABLE) short texts gain 7 %, long ones lose and take 200 MB more; pinning gains
nothing; OpenVINO's own model cache saves 0.1 s of a 0.2 s compilation and takes the disk space again.

Integer weights (int8 artifacts) can be computed in three ways. Same model and processor, one thread, throughput as
a share of bf16's, best of 10 interleaved windows, and the process's memory after some batches:

                                                      8 x 13  32 x 32  16 x 128  8 x 256    memory
    bf16, weights not quantized                        1.00     1.00     1.00     1.00      344 MB
    fp32, weights not quantized                        0.61     0.53     0.53     0.55      409 MB
    bf16, weights unpacked in each inference           0.89     0.88     0.87     0.90      264 MB
    bf16, weights unpacked when loaded                 0.99     1.00     0.99     1.02      360 MB
    activations to 8 bits as they come, rest bf16      1.09     1.10     1.04     1.09      273 MB
    activations to 8 bits as they come, rest fp32      1.10     1.08     0.98     0.96      295 MB
    fp32, weights unpacked in each inference           0.59     0.52     0.51     0.54

So int8 ("activations as they come", 32 values a scale; with 16 it is 0.86) is computed where `cpu.fast_int8` says
so and the model bears it (see `make`): there it is nearly twice as fast as fp32, which counts where there is no bf16.
At bf16 matrices are unpacked when loaded (tables stay small: their rows are looked up), since unpacking each time
costs a tenth here and was measured at a quarter with AMX; at fp32 they are left as they are, which costs nothing.
"""

from __future__ import annotations

import importlib
import math
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from emb_model_provider.backends.hardware import native_bf16
from emb_model_provider.errors import LoadError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from emb_model_provider.backends.base import ComputePrecision

Graph = Any
"""An `openvino.Model`: untyped, since OpenVINO's stubs cover only a part of it."""

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POOLING_MASK = "pooling_mask"
"""Names of a graph's inputs, each int64 of shape (batch, length). The last is there where prompts are left out."""

_MAX_STREAMS = 4
"""With more processors than this a lane gets several: a stream of one thread would be slow for a long text.
Not measured beyond two processors."""
_ACTIVATION_GROUP = 32
"""Values of an activation that share a scale where they become 8-bit integers."""
_HINTS: dict[ComputePrecision, str] = {"fp32": "f32", "bf16": "bf16"}
_UNPACKING = ("Convert", "Subtract", "Multiply", "Reshape", "Transpose")
"""Operations that make numbers of integers, as nncf writes them into a graph."""
_table_lock = threading.Lock()
_CACHED_SHAPES = 64
"""Kernels that OpenVINO keeps ready for shapes it has seen. Its default of 5,000 costs 0.35 MB each and grew the
process to 590 MB within 400 shapes; with 64 it was at 420 MB then, no slower, and levels off (docs/performance.md)."""


@dataclass(frozen=True, slots=True)
class StreamLayout:
    """How a processor is shared among batches."""

    streams: int
    """Batches side by side."""
    threads: int
    """Of all lanes together, and of the one wide lane that a lone batch gets."""

    @property
    def has_latency_request(self) -> bool:
        return self.streams > 1


def stream_layout(cpus: int) -> StreamLayout:
    """Return the layout for a number of processors: a lane each, up to four lanes."""
    return StreamLayout(streams=max(1, min(cpus, _MAX_STREAMS)), threads=max(1, cpus))


def openvino() -> Any:
    """Import OpenVINO, without the package that reports its use to Google Analytics.

    Untyped on purpose: its stubs cover only a part of it.

    Raises: LoadError where it is not installed, or not for this machine.
    """
    # A name that maps to None cannot be imported: OpenVINO then uses its own stand-in, which sends nothing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as the import system documents
    try:
        import openvino as module  # type: ignore[import-untyped]  # no py.typed, and stubs for a part only
    except ImportError as error:
        raise LoadError(
            f"OpenVINO cannot be imported here ({error}). Install it (pip install openvino), or set "
            "EMB_PROVIDER_BACKEND=torch."
        ) from error
    # The first conversion of a type fills a table in C++. Two threads that do so at the same moment, such as two models
    # that are loaded side by side, wait for each other for ever, and all of Python with them: one holds the
    # interpreter's lock and waits for the table, the other the other way round (2026.4.1: in 15 of 25 tries).
    with _table_lock:
        module.Type.i64.to_dtype()
    return module


class Compiled(NamedTuple):
    """A graph that is ready to run."""

    streams: Any
    latency_model: Any | None
    matrix_items: int
    """Numbers that its matrices hold."""
    unpacked_bytes: int
    """Of those, the bytes of what was stored as integers and was made numbers of."""


def compile_streams(path: Path, precision: ComputePrecision, layout: StreamLayout) -> Compiled:
    """Compile a graph for all lanes, and for the wide lane if there is one. They share their weights.

    Raises: LoadError where the graph cannot be read or compiled.
    """
    core = openvino().Core()
    try:
        graph = core.read_model(path)
        matrix_items = sum(math.prod(value.get_shape()) for value in _matrices(graph))
        unpacked_bytes = _unpack_matrices(graph) if precision == "bf16" else 0
        streams = core.compile_model(graph, "CPU", _options(precision, layout.streams, layout.threads))
        latency_model = None
        if layout.has_latency_request:
            latency_model = core.compile_model(graph, "CPU", _options(precision, 1, layout.threads))
    except RuntimeError as error:
        raise LoadError(
            f"OpenVINO cannot run {path}: {str(error).strip().splitlines()[-1]}. Remove its directory, so that it "
            "is made again, or set EMB_PROVIDER_BACKEND=torch."
        ) from error
    return Compiled(streams, latency_model, matrix_items, unpacked_bytes)


def _matrices(graph: Graph) -> Iterator[Any]:
    """Yield the graph's values that are multiplied with others and are the same for every input."""
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            values = (node.input_value(port) for port in (0, 1))
            yield from (value for value in values if _stored(value) is not None)


def _unpack_matrices(graph: Graph) -> int:
    """Turn matrices that are stored as integers into numbers, once; return the bytes of those numbers.

    A graph without any is left as it is.
    """
    made = 0
    passes = importlib.import_module("openvino.passes")
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        for port in (0, 1):
            value = node.input_value(port)
            if not _is_packed(value):
                continue
            manager = passes.Manager()
            manager.register_pass(passes.ConstantFolding())
            packed = openvino().Model([value.get_node()], [], "weights")
            manager.run_passes(packed)
            numbers = packed.outputs[0].get_node().input_value(0)
            made += math.prod(numbers.get_shape()) * numbers.get_element_type().size
            node.input(port).replace_source_output(numbers)
    return made


def _is_packed(value: Any) -> bool:
    return _stored(value) == "integers"


def _stored(value: Any) -> Literal["numbers", "integers"] | None:
    """Return as what a value is stored that is made of nothing but constants, by unpacking; None for any other."""
    integers, waiting = False, [value.get_node()]
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Constant":
            integers |= node.get_element_type().is_integral_number() and len(node.shape) > 1
        elif node.get_type_name() in _UNPACKING:
            waiting += [node.input_value(place).get_node() for place in range(node.get_input_size())]
        else:
            return None
    return "integers" if integers else "numbers"


def _options(precision: ComputePrecision, streams: int, threads: int) -> dict[str, Any]:
    integers = precision == "int8"
    rest: ComputePrecision = ("bf16" if native_bf16() else "fp32") if integers else precision
    return {
        "INFERENCE_PRECISION_HINT": _HINTS[rest],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(_ACTIVATION_GROUP if integers else 0),
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": str(threads),
        # Pinned threads of two processes in one container would share a core while another idles.
        "ENABLE_CPU_PINNING": False,
        "CPU_RUNTIME_CACHE_CAPACITY": str(_CACHED_SHAPES),
    }
