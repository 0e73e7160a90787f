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
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emb_model_provider.errors import LoadError

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.backends.base import ComputePrecision

Graph = Any
"""An `openvino.Model`: untyped, since OpenVINO's stubs cover only a part of it."""

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POOLING_MASK = "pooling_mask"
"""Names of a graph's inputs, each int64 of shape (batch, length). The last is there where prompts are left out."""

_MOST_LANES = 4
"""With more processors than this a lane gets several: a stream of one thread would be slow for a long text.
Not measured beyond two processors."""
_HINTS: dict[ComputePrecision, str] = {"fp32": "f32", "bf16": "bf16"}
_CACHED_SHAPES = 64
"""Kernels that OpenVINO keeps ready for shapes it has seen. Its default of 5,000 costs 0.35 MB each and grew the
process to 590 MB within 400 shapes; with 64 it stayed below 420 MB and was no slower."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a processor is shared among batches."""

    lanes: int
    """Batches side by side."""
    threads: int
    """Of all lanes together, and of the one wide lane that a lone batch gets."""

    @property
    def has_wide_lane(self) -> bool:
        return self.lanes > 1


def layout_for(cpus: int) -> Layout:
    """Return the layout for a number of processors: a lane each, up to four lanes."""
    return Layout(lanes=max(1, min(cpus, _MOST_LANES)), threads=max(1, cpus))


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
    return module


def compile_lanes(path: Path, precision: ComputePrecision, layout: Layout) -> tuple[Any, Any | None]:
    """Compile a graph for all lanes, and for the wide lane if there is one. They share their weights.

    Raises: LoadError where the graph cannot be read or compiled.
    """
    core = openvino().Core()
    try:
        graph = core.read_model(path)
        lanes = core.compile_model(graph, "CPU", _options(precision, layout.lanes, layout.threads))
        wide = None
        if layout.has_wide_lane:
            wide = core.compile_model(graph, "CPU", _options(precision, 1, layout.threads))
    except RuntimeError as error:
        raise LoadError(
            f"OpenVINO cannot run {path}: {str(error).strip().splitlines()[-1]}. Remove its directory, so that it "
            "is made again, or set EMB_PROVIDER_BACKEND=torch."
        ) from error
    return lanes, wide


def _options(precision: ComputePrecision, streams: int, threads: int) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": str(threads),
        # Pinned threads of two processes in one container would share a core while another idles.
        "ENABLE_CPU_PINNING": False,
        "CPU_RUNTIME_CACHE_CAPACITY": str(_CACHED_SHAPES),
    }
