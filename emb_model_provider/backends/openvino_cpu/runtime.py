"""OpenVINO on this processor: import it, and compile a graph for it.

A graph is compiled twice, with shared weights, which costs 30 MB: one thread per stream has the highest throughput, and
all threads on one batch answer a lone request in little more than half the time (see docs/performance.md). The second one is
compiled when it pays.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import mmap
import sys
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from emb_model_provider.backends.hardware import native_bf16
from emb_model_provider.errors import LoadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from emb_model_provider.backends.base import ComputePrecision, Tuning

Graph = Any
"""An `openvino.Model`. Untyped, because the stubs of OpenVINO are incomplete."""

_MAX_STREAMS = 4
"""With more processors, a stream gets several threads, because one thread is slow at a long text. Not measured with more
than two processors."""
ACTIVATION_GROUPS = (64, 32)
"""Values of an activation that share a scale when they are quantized. With more, a model is faster and less accurate; with
128 it is hardly faster, with 16 as slow as without quantization (see docs/performance.md)."""
_HINTS: dict[ComputePrecision, str] = {"fp32": "f32", "bf16": "bf16"}
_DEQUANTIZING = ("Convert", "Subtract", "Multiply", "Reshape", "Transpose")
"""Operations that dequantize integers, as nncf writes them into a graph."""
_CACHED_SHAPES = 64
"""Number of shapes for which OpenVINO keeps kernels, 0.35 MB each. Its default of 5,000 lets the process grow, and is
not faster (see docs/performance.md)."""
_TYPE_TABLE_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class StreamLayout:
    """How the processors are shared among batches."""

    streams: int
    threads: int
    """Threads of all streams together, and those of the latency request."""

    @property
    def has_latency_request(self) -> bool:
        """Whether a lone batch gets all threads. With one stream it has them anyway."""
        return self.streams > 1


def stream_layout(cpus: int, streams: int | None = None) -> StreamLayout:
    """Return the layout for a number of processors, by default with one stream per processor, up to four."""
    return StreamLayout(streams=max(1, min(cpus, streams or _MAX_STREAMS)), threads=max(1, cpus))


def openvino() -> Any:
    """Import OpenVINO without the package that reports its use to Google Analytics; LoadError if that fails."""
    # A name that maps to None cannot be imported; OpenVINO then uses a stub that sends nothing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as the import system documents
    try:
        import openvino as module  # type: ignore[import-untyped]  # no py.typed, and incomplete stubs
    except ImportError as error:
        raise LoadError(
            f"OpenVINO cannot be imported here ({error}). Install it (pip install openvino), or choose "
            "the backend torch: `--backend torch`, or EMB_PROVIDER_BACKEND=torch."
        ) from error
    # The first conversion of a type fills a table in C++. Two threads that do so at the same time, such as two models
    # that are being loaded, deadlock with the GIL: one holds it and waits for the table, the other holds the table and
    # waits for the GIL (OpenVINO 2026.4.1).
    with _TYPE_TABLE_LOCK:
        module.Type.i64.to_dtype()
    return module


class Compiled(NamedTuple):
    """A graph that is ready to run, compiled for several streams."""

    streams: Any
    compile_latency: Callable[[], Any]
    """Compiles the graph again, and returns an infer request that uses all threads. It shares the weights."""
    compile_length: Callable[[int], Any]
    """Compiles the graph again for one input of a length, and returns an infer request that uses all threads. Used by one
    thread at a time."""
    matrix_items: int
    """Number of values in its matrices."""
    dequantized_bytes: int
    """Bytes of the matrices that were stored as integers and dequantized when the graph was compiled."""


def compile_streams(
    path: Path, precision: ComputePrecision, layout: StreamLayout, tuning: Tuning, activation_group: int | None = None
) -> Compiled:
    """Compile a graph for all streams.

    `activation_group` is that of the description, by default the most accurate one.
    """
    core = openvino().Core()
    try:
        graph = core.read_model(path)
        matrix_items = sum(math.prod(operand.get_source_output().get_shape()) for operand, _ in _matrices(graph))
        dequantized_bytes = _dequantize_matrices(graph) if precision == "bf16" else 0
        group = activation_group or min(ACTIVATION_GROUPS)
        options = _options(precision, layout.streams, layout.threads, tuning.fused_attention, group)
        streams = core.compile_model(graph, "CPU", options)
    except RuntimeError as error:
        raise LoadError(
            f"OpenVINO cannot run {path}: {str(error).strip().splitlines()[-1]}. Remove its directory, so that it "
            "is compiled again, or choose the backend torch: `--backend torch`, or EMB_PROVIDER_BACKEND=torch."
        ) from error
    options = _options(precision, 1, layout.threads, tuning.fused_attention_alone, group)
    compile_length = partial(_compile_request, core, graph, path, options)
    return Compiled(streams, partial(compile_length, None), compile_length, matrix_items, dequantized_bytes)


def _compile_request(core: Any, graph: Graph, path: Path, options: dict[str, Any], length: int | None) -> Any:
    """Return an infer request for one input of a length, or for inputs of all shapes."""
    if length is not None:
        graph = graph.clone()
        graph.reshape({each.any_name: [1, length] for each in graph.inputs})
    request = core.compile_model(graph, "CPU", options).create_infer_request()
    release_pages(path.with_suffix(".bin"))
    return request


def release_pages(path: Path) -> None:
    """Return the memory of a mapped file to the system. Pages that are needed later are read from the file again, singly.

    OpenVINO reads all matrices from the file with the weights when it arranges them for its kernels, and then hardly
    anything. Does nothing where the system has no `/proc/self/maps`.
    """
    try:
        mappings = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    except (AttributeError, OSError, TypeError):
        return
    name = str(path.resolve())
    for mapping in mappings:
        # Private mappings that can be written may have pages that are in no file.
        if mapping.endswith(name) and mapping.split(maxsplit=2)[1].startswith("r--"):
            start, end = (int(address, 16) for address in mapping.split(maxsplit=1)[0].split("-"))
            libc.madvise(start, end - start, mmap.MADV_DONTNEED)
            # Otherwise a row of a token table can make 2 MB of the page cache resident.
            libc.madvise(start, end - start, mmap.MADV_NOHUGEPAGE)


def _matrices(graph: Graph) -> Iterator[tuple[Any, Literal["floats", "integers"]]]:
    """Yield the constant operands of matrix multiplications, and how they are stored."""
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            for operand in node.inputs():
                stored = _stored(operand.get_source_output())
                if stored is not None:
                    yield operand, stored


def _dequantize_matrices(graph: Graph) -> int:
    """Replace matrices that are stored as integers by their dequantized values, and return the bytes of these.

    Dequantizing them in each inference costs 10 to 25 % at bf16, and nothing at fp32. Tables remain integers, because
    only single rows of them are read.
    """
    dequantized_bytes = 0
    passes = importlib.import_module("openvino.passes")
    for operand, stored in _matrices(graph):
        if stored == "floats":
            continue
        manager = passes.Manager()
        manager.register_pass(passes.ConstantFolding())
        weights = openvino().Model([operand.get_source_output().get_node()], [], "weights")
        manager.run_passes(weights)
        folded = weights.outputs[0].get_node().input_value(0)
        dequantized_bytes += math.prod(folded.get_shape()) * folded.get_element_type().size
        operand.replace_source_output(folded)
    return dequantized_bytes


def _stored(value: Any) -> Literal["floats", "integers"] | None:
    """Return how a constant, dequantized or not, is stored; None for a value that is not constant."""
    integers, pending = False, [value.get_node()]
    while pending:
        node = pending.pop()
        if node.get_type_name() == "Constant":
            integers |= node.get_element_type().is_integral_number() and len(node.shape) > 1
        elif node.get_type_name() in _DEQUANTIZING:
            pending += [node.input_value(port).get_node() for port in range(node.get_input_size())]
        else:
            return None
    return "integers" if integers else "floats"


def float_precision() -> ComputePrecision:
    """Return the faster precision of this processor for what is not quantized: fp32 or bf16."""
    return "bf16" if native_bf16() else "fp32"


def _options(
    precision: ComputePrecision, streams: int, threads: int, fused_attention: bool, activation_group: int
) -> dict[str, Any]:
    quantized = precision == "int8"
    rest = float_precision() if quantized else precision
    options = {
        "INFERENCE_PRECISION_HINT": _HINTS[rest],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(activation_group if quantized else 0),
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": str(threads),
        # Pinned threads of two processes in one container would share a core while another core is idle.
        "ENABLE_CPU_PINNING": False,
        "CPU_RUNTIME_CACHE_CAPACITY": str(_CACHED_SHAPES),
    }
    if not fused_attention:
        options["SNIPPETS_MODE"] = "DISABLE"
    return options
