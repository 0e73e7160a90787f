"""Builds an artifact: load the snapshot, export it, convert and compare it, and write the files."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.artifacts.compiler_process import CompileResult
from emb_model_provider.artifacts.manifest import GRAPH, TOKENIZER, write_manifest
from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
from emb_model_provider.backends.openvino_cpu.runtime import openvino
from emb_model_provider.backends.pipeline_plan import plan_pipeline
from emb_model_provider.backends.pytorch.description import describe
from emb_model_provider.backends.pytorch.pipeline import load_pipeline
from emb_model_provider.compiler.export import EXPORTERS, check_exportable, prebuilt_exporters
from emb_model_provider.compiler.quantize import QuantizeError, quantize
from emb_model_provider.errors import LoadError, UnsupportedModelError
from emb_model_provider.fidelity.compare import (
    CORPUS_S,
    LONGEST_COMPARED,
    MismatchError,
    compare,
    comparison_limit,
    make_cases,
)
from emb_model_provider.formatting import describe_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

    from emb_model_provider.artifacts.compiler_process import CompileJob
    from emb_model_provider.backends.base import ComputePrecision, Fidelity, ModelDescription
    from emb_model_provider.compiler.export import Exporter
    from emb_model_provider.compiler.quantize import QuantizedWeights
    from emb_model_provider.fidelity.compare import Case

logger = logging.getLogger(__name__)

ACCURACY_TARGETS: Mapping[ComputePrecision, tuple[float, float]] = {"int8": (0.995, 0.97), "int4": (0.97, 0.92)}
"""Targets of integer weights: the lowest cosine to fp32, and the share of the ten nearest neighbors kept."""
_EXACT_GRAPH = "exact.xml"
"""The graph before quantization, in the directory of the artifact."""


def build_artifact(
    job: CompileJob,
    on_step: Callable[[str], None],
    *,
    exporters: Mapping[str, Exporter] = EXPORTERS,
    corpus_s: float = CORPUS_S,
) -> CompileResult:
    """Make the artifact of a job. Its manifest is written only if the vectors are accurate enough.

    `exporters` are tried in order, and after them the prebuilt exports among the files of the snapshot. Embedding the
    corpus with the reference model may take `corpus_s` seconds. Errors of reading and writing files are raised.
    """
    on_step("load")
    try:
        pipeline, description = _load(job)
    except LoadError as error:
        return CompileResult("broken", error.message)
    try:
        check_exportable(pipeline)
    except UnsupportedModelError as error:
        return CompileResult("unsupported", error.message)
    on_step("reference vectors")
    cases = _reference_cases(pipeline, description, corpus_s)
    weights = job.recipe.weights
    failures: list[str] = []
    inaccurate = False
    for name, export in {**exporters, **prebuilt_exporters(job.snapshot)}.items():
        try:
            graph = export(pipeline, on_step)
        except OSError:
            raise
        except Exception as error:
            logger.exception("%s failed", name)
            failures.append(f"{name}: {describe_error(error)}")
            continue
        path = job.directory / (_EXACT_GRAPH if weights in ("int8", "int4") else GRAPH)
        on_step("save")
        openvino().save_model(graph, path, compress_to_fp16=weights == "fp16")
        del graph
        on_step("verify")
        # Before quantization the graph must be exact at fp32, so that a wrong conversion is not taken for the loss of
        # accuracy by quantization.
        compute = job.recipe.compute if path.name == GRAPH else ("fp32",)
        accurate, reasons = _first_accurate(path, compute, job, description, cases)
        if accurate is not None and (weights == "int8" or weights == "int4"):
            try:
                accurate, reasons = _quantize(path, weights, job, description, cases, on_step)
            except ImportError as error:
                return CompileResult("unable", f"{error}: precision {weights} needs nncf (pip install nncf)")
            except QuantizeError as error:
                failures.append(f"{name}: {error}")
                continue
        if accurate is not None:
            on_step("write")
            (job.directory / TOKENIZER).write_text(accurate.tokenizer_json, encoding="utf-8")
            write_manifest(job.directory, job.recipe, accurate, made_by=name)
            return CompileResult("done")
        inaccurate = True
        failures += [f"{name}: {reason}" for reason in reasons]
    return CompileResult("refused" if inaccurate else "unsupported", "; ".join(failures))


def _load(job: CompileJob) -> tuple[SentenceTransformer, ModelDescription]:
    spec = replace(job.spec, prompts=None)
    name, trusted = job.snapshot.repository, job.recipe.trust_remote_code
    plan = plan_pipeline(spec, job.snapshot, trust_remote_code=trusted)
    pipeline = load_pipeline(plan, name, precision="fp32", device="cpu", trust_remote_code=trusted)
    if pipeline.transformers_model is not None:
        # The key-value cache of a decoder would become part of the graph without being used.
        pipeline.transformers_model.config.use_cache = False
    description = describe(pipeline, plan, name, precision="fp32", device="cpu", backend="openvino")
    if description.max_length > LONGEST_COMPARED:
        note = (
            f"compared with the reference on texts of up to {LONGEST_COMPARED} tokens, of the "
            f"{description.max_length} that it reads"
        )
        description = replace(description, notes=(*description.notes, note))
    return pipeline, description


def _reference_cases(pipeline: SentenceTransformer, description: ModelDescription, corpus_s: float) -> list[Case]:
    """Embed the comparison texts with sentence-transformers, truncated to the maximum length of the comparison."""
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

    return make_cases(embed, description, corpus_s=corpus_s)


def _quantize(
    exact: Path,
    weights: QuantizedWeights,
    job: CompileJob,
    description: ModelDescription,
    cases: Sequence[Case],
    on_step: Callable[[str], None],
) -> tuple[ModelDescription | None, list[str]]:
    """Quantize the exact graph, remove it, and measure the quantized one."""
    on_step(f"quantize to {weights}")
    graph = quantize(openvino().Core().read_model(exact), weights, description)
    on_step("save")
    openvino().save_model(graph, job.directory / GRAPH, compress_to_fp16=False)
    del graph
    for path in (exact, exact.with_suffix(".bin")):
        path.unlink()
    on_step("measure")
    description = replace(description, precision=weights)
    return _first_accurate(job.directory / GRAPH, job.recipe.compute, job, description, cases)


def _first_accurate(
    graph: Path,
    compute: Sequence[ComputePrecision],
    job: CompileJob,
    description: ModelDescription,
    cases: Sequence[Case],
) -> tuple[ModelDescription | None, list[str]]:
    """Return the description at the first precision that is accurate enough, and why those before it are not.

    Integer weights are only measured, because their floor is a setting of the service. But 8-bit activations are
    used only if they reach the accuracy target of the weights.
    """
    reasons: list[str] = []
    target = ACCURACY_TARGETS.get(description.precision)
    for precision in compute:
        exact = replace(description, precision=precision)
        candidate = exact if target is None else replace(description, compute=precision)
        backend = OpenVinoBackend(graph, candidate, cpus=job.threads)
        try:
            fidelity = compare(backend, cases, exact=target is None)
        except MismatchError as error:
            reasons.append(f"at {precision}, {error}")
            continue
        finally:
            backend.close()
        if target is not None and precision == "int8" and not _reaches(fidelity, *target):
            reasons.append(
                f"with activations in 8 bits (lowest cosine {fidelity.min_cosine:.4f}, "
                f"{fidelity.top10_overlap or 0:.4f} of neighbors kept; the targets are {target[0]} and {target[1]})"
            )
            continue
        notes = (f"computed in {precision}, because it is not accurate enough {reason}" for reason in reasons)
        return replace(candidate, fidelity=fidelity, notes=(*description.notes, *notes)), reasons
    return None, reasons


def _reaches(fidelity: Fidelity, min_cosine: float, min_overlap: float) -> bool:
    kept = 1.0 if fidelity.top10_overlap is None else fidelity.top10_overlap
    return fidelity.min_cosine >= min_cosine and kept >= min_overlap
