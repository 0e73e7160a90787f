"""From a snapshot to an artifact's files. Runs in the compile process only, and imports all that it takes."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.artifacts.compile_job import CompileResult
from emb_model_provider.artifacts.manifest import GRAPH, TOKENIZER, write_manifest
from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
from emb_model_provider.backends.openvino_cpu.runtime import openvino
from emb_model_provider.backends.pipeline_plan import plan_pipeline
from emb_model_provider.backends.pytorch.description import describe
from emb_model_provider.backends.pytorch.pipeline import load_pipeline, strip_final_normalize
from emb_model_provider.compiler import export as graphs
from emb_model_provider.compiler.export import prebuilt_exports
from emb_model_provider.compiler.quantize import QuantizeError, quantize
from emb_model_provider.errors import LoadError, UnsupportedModelError
from emb_model_provider.fidelity.compare import (
    LONGEST_COMPARED,
    MismatchError,
    compare,
    comparison_limit,
    make_cases,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

    from emb_model_provider.artifacts.compile_job import CompileJob
    from emb_model_provider.backends.base import ComputePrecision, Fidelity, ModelDescription
    from emb_model_provider.compiler.quantize import QuantizedWeights
    from emb_model_provider.fidelity.compare import Case

logger = logging.getLogger(__name__)

_EXACT_GRAPH = "exact.xml"
"""In the artifact's directory while it is made: what is to be quantized."""
ACCURACY_TARGETS: dict[ComputePrecision, tuple[float, float]] = {"int8": (0.995, 0.97), "int4": (0.97, 0.92)}
"""What integer weights are to keep: the lowest cosine to fp32, and the share of ten nearest neighbours."""


def make(job: CompileJob, tell: Callable[[str], None]) -> CompileResult:
    """Load, export, convert, verify and write; `tell` is called with the name of each phase as it begins.

    Raises: OSError where the disk refuses; MemoryError.
    """
    tell("load")
    try:
        pipeline, description = _load(job)
    except LoadError as error:
        return CompileResult("broken", error.message)
    try:
        graphs.check_exportable(pipeline)
    except UnsupportedModelError as error:
        return CompileResult("unsupported", error.message)
    tell("reference vectors")
    cases = reference_cases(pipeline, description)
    failures: list[str] = []
    untrue = False
    for way, convert in {**graphs.EXPORTERS, **prebuilt_exports(job.snapshot)}.items():
        try:
            graph = convert(pipeline, tell)
        except OSError:
            raise
        except Exception as error:
            logger.exception("%s failed", way)
            failures.append(f"{way}: {_one_line(error)}")
            continue
        weights = job.recipe.weights
        path = job.directory / (_EXACT_GRAPH if weights in ("int8", "int4") else GRAPH)
        tell("save")
        openvino().save_model(graph, path, compress_to_fp16=weights == "fp16")
        del graph
        tell("verify")
        # A wrong conversion must not pass for the cost of quantizing: what is quantized was exact at fp32.
        compute = job.recipe.compute if path.name == GRAPH else ("fp32",)
        verified, reasons = _first_accurate(path, compute, job, description, cases)
        if verified is not None and (weights == "int8" or weights == "int4"):
            try:
                verified, reasons = _quantized(path, weights, job, description, cases, tell)
            except ImportError as error:
                return CompileResult(
                    "unable", f"{error}: precision {weights} is made by nncf (pip install nncf)"
                )
            except QuantizeError as error:
                failures.append(f"{way}: {error}")
                continue
        if verified is not None:
            tell("write")
            _write(job, verified, way)
            return CompileResult("done")
        untrue = True
        failures += [f"{way}: {reason}" for reason in reasons]
    return CompileResult("refused" if untrue else "unsupported", "; ".join(failures))


def _load(job: CompileJob) -> tuple[SentenceTransformer, ModelDescription]:
    spec = replace(job.spec, prompts=None)
    trusted = job.recipe.trust_remote_code
    plan = plan_pipeline(spec, job.snapshot, trust_remote_code=trusted)
    pipeline = load_pipeline(plan, precision="fp32", device="cpu", trust_remote_code=trusted)
    graphs.without_cache(pipeline)
    # As the torch backend does: a Normalize before a cut to truncate_dim is not the model's last step.
    cut_after_normalize = plan.truncate_dim is not None and plan.normalize is None
    normalize = False if cut_after_normalize else strip_final_normalize(pipeline)
    try:
        dimension = graphs.dimension_of(pipeline)
    except Exception as error:
        raise LoadError(f"it was loaded but cannot embed: {_one_line(error)}") from error
    description = describe(
        pipeline, plan, dimension=dimension, normalize=normalize, precision="fp32", device="cpu", backend="openvino"
    )  # fmt: skip
    if description.max_length > LONGEST_COMPARED:
        note = f"compared with the reference on texts of up to {LONGEST_COMPARED} tokens; it reads {description.max_length}"
        description = replace(description, notes=(*description.notes, note))
    return pipeline, description


def reference_cases(pipeline: SentenceTransformer, description: ModelDescription) -> list[Case]:
    """Embed the comparison texts with sentence-transformers.

    Args:
        pipeline: The model at fp32. Its maximum length is lowered to that of the comparison.
        description: The description of the model.
    """
    pipeline.max_seq_length = comparison_limit(description)

    def embed(texts: Sequence[str], prompt: str) -> NDArray[np.float32]:
        vectors = pipeline.encode(
            list(texts),
            prompt=prompt,
            batch_size=8 if len(texts) > 16 else 1,
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=False,
        )
        return np.asarray(vectors, dtype=np.float32)

    return make_cases(embed, description)


def _quantized(
    exact: Path,
    weights: QuantizedWeights,
    job: CompileJob,
    description: ModelDescription,
    cases: Sequence[Case],
    tell: Callable[[str], None],
) -> tuple[ModelDescription | None, list[str]]:
    """Quantize the graph in `exact`, which is removed, and measure what came of it.

    Raises: QuantizeError; ImportError.
    """
    tell(f"quantize to {weights}")
    graph = quantize(openvino().Core().read_model(exact), weights, description)
    tell("save")
    openvino().save_model(graph, job.directory / GRAPH, compress_to_fp16=False)
    del graph
    for path in (exact, exact.with_suffix(".bin")):
        path.unlink()
    tell("measure")
    description = replace(description, precision=weights)
    return _first_accurate(job.directory / GRAPH, job.recipe.compute, job, description, cases)


def _first_accurate(
    graph: Path,
    compute: Sequence[ComputePrecision],
    job: CompileJob,
    description: ModelDescription,
    cases: Sequence[Case],
) -> tuple[ModelDescription | None, list[str]]:
    """Return the description at the first precision that is true enough, and why those before it were not.

    A description of integer weights is only measured: whoever serves it judges. But activations become integers,
    too, only where the weights' own aim is kept.
    """
    reasons: list[str] = []
    aim = ACCURACY_TARGETS.get(description.precision)
    for precision in compute:
        exact = replace(description, precision=precision)
        candidate = exact if aim is None else replace(description, compute=precision)
        backend = OpenVinoBackend(graph, candidate, cpus=job.threads)
        try:
            fidelity = compare(backend, cases, exact=aim is None)
        except MismatchError as error:
            reasons.append(f"at {precision}, {error}")
            continue
        finally:
            backend.close()
        if aim is not None and precision == "int8" and not _reaches(fidelity, *aim):
            reasons.append(
                f"with activations in 8 bits, too: lowest cosine {fidelity.min_cosine:.4f} and "
                f"{fidelity.top10_overlap or 0:.4f} of neighbours kept are to be {aim[0]} and {aim[1]}"
            )
            continue
        notes = (f"computed in {precision}, since it is not true enough {reason}" for reason in reasons)
        return replace(candidate, fidelity=fidelity, notes=(*description.notes, *notes)), reasons
    return None, reasons


def _reaches(fidelity: Fidelity, cosine: float, overlap: float) -> bool:
    kept = 1.0 if fidelity.top10_overlap is None else fidelity.top10_overlap
    return fidelity.min_cosine >= cosine and kept >= overlap


def _write(job: CompileJob, description: ModelDescription, way: str) -> None:
    (job.directory / TOKENIZER).write_text(description.tokenizer_json, encoding="utf-8")
    write_manifest(job.directory, job.recipe, description, made_by=way)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
