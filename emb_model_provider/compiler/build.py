"""Builds an artifact: load the snapshot, export it, convert and compare it, and write the files."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from emb_model_provider.artifacts.compiler_process import CompileResult
from emb_model_provider.artifacts.manifest import GRAPH, TOKENIZER, probe, write_manifest
from emb_model_provider.backends.arrays import finite_rows
from emb_model_provider.backends.base import Tuning
from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
from emb_model_provider.backends.openvino_cpu.runtime import ACTIVATION_GROUPS, openvino
from emb_model_provider.backends.openvino_cpu.tuning import measure_int8_gain, tune
from emb_model_provider.backends.pipeline_plan import plan_pipeline
from emb_model_provider.backends.pytorch.description import describe
from emb_model_provider.backends.pytorch.heads import Served, serve_pipeline
from emb_model_provider.backends.pytorch.padding import depends_on_padding
from emb_model_provider.backends.pytorch.pipeline import load_pipeline
from emb_model_provider.backends.repository import Repository
from emb_model_provider.compiler.export import EXPORTERS, check_exportable, prebuilt_exporter, prebuilt_exporters
from emb_model_provider.compiler.failures import describe_export_error, is_temporary
from emb_model_provider.compiler.prebuilt import load_prebuilt
from emb_model_provider.compiler.quantize import QuantizeError, quantize
from emb_model_provider.compiler.reference import reference_of
from emb_model_provider.errors import LoadError, UnsupportedModelError
from emb_model_provider.fidelity.cases import CORPUS_S, LONGEST_COMPARED, Runner, comparison_limit, make_cases
from emb_model_provider.fidelity.compare import MIN_COSINE, MismatchError, compare
from emb_model_provider.formatting import describe_error, format_cosine
from emb_model_provider.snapshots.files import require_space
from emb_model_provider.snapshots.weights import find_export

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from sentence_transformers.base.model import BaseModel

    from emb_model_provider.artifacts.compiler_process import CompileJob
    from emb_model_provider.backends.base import Backend, ComputePrecision, Fidelity, ModelDescription
    from emb_model_provider.backends.openvino_cpu.runtime import Graph
    from emb_model_provider.compiler.export import Exporter
    from emb_model_provider.compiler.quantize import QuantizedWeights
    from emb_model_provider.fidelity.cases import Case

logger = logging.getLogger(__name__)

ACCURACY_TARGETS: Mapping[ComputePrecision, tuple[float, float]] = {"int8": (0.995, 0.97), "int4": (0.97, 0.92)}
"""Targets of integer weights: the lowest cosine to fp32, and the share of the ten nearest neighbors kept."""
_EXACT_GRAPH = "exact.xml"
"""The graph before quantization, in the directory of the artifact."""
_REFERENCE_GRAPH = "reference.xml"
"""The graph of an export that is its own reference, likewise."""


class Measure(Protocol):
    """Compares a backend with reference vectors, like `compare`."""

    def __call__(self, backend: Backend, cases: Sequence[Case], *, exact: bool) -> Fidelity: ...


def build_artifact(
    job: CompileJob,
    on_step: Callable[[str], None],
    *,
    exporters: Mapping[str, Exporter] = EXPORTERS,
    corpus_s: float = CORPUS_S,
    measure: Measure = compare,
) -> CompileResult:
    """Make the artifact of a job. Its manifest is written only if its results are accurate enough.

    Args:
        job: The artifact to make.
        on_step: Called with the name of each step when it begins.
        exporters: They are tried in order, and after them the prebuilt exports among the files of the snapshot.
        corpus_s: Seconds that embedding the corpus with the reference model may take.
        measure: Compares a backend with the reference vectors; see `compare`.

    Raises:
        OSError: A file cannot be read or written.
        MemoryError: There is not enough memory; likewise a RuntimeError of a library for which `is_temporary` is true.
    """
    on_step("load")
    only_export = find_export([file.path for file in job.snapshot.files])
    try:
        loaded = _load(job, only_export)
    except LoadError as error:
        return CompileResult("broken", error.message)
    served, description = loaded.served, loaded.description
    try:
        check_exportable(served)
        if only_export is None:
            if _depends_on_padding(loaded):
                return CompileResult("unsupported", "its results depend on padding, which only torch can run without")
            embed = partial(_reference_cases, loaded, corpus_s)
            exporters = {**exporters, **prebuilt_exporters(job.snapshot)}
        else:
            completed, description = _complete_export(job, only_export, served, description, on_step)
            embed = partial(_cases_of_export, job, completed, description, corpus_s)
            exporters = {only_export: _returning(completed)}
    except UnsupportedModelError as error:
        return CompileResult("unsupported", error.message)
    verification = _Verification(job, embed, measure, has_reference=only_export is None)
    weights = job.recipe.weights
    failures: list[str] = []
    inaccurate = False
    for name, export in exporters.items():
        path = job.directory / (_EXACT_GRAPH if weights in ("int8", "int4") else GRAPH)
        try:
            graph = export(served, on_step)
            on_step("save")
            _save(graph, path, compress_to_fp16=weights == "fp16")
            del graph
            verification.embed_reference(on_step)
            accurate, reasons = verification.verify(path, description, on_step)
        except _ReferenceError as error:
            return CompileResult("unsupported", error.message)
        except Exception as error:
            if is_temporary(error):
                raise
            logger.exception("%s failed", name)
            failures.append(f"{name}: {describe_export_error(error)}")
            continue
        if accurate is not None and (weights == "int8" or weights == "int4"):
            try:
                accurate, reasons = _quantize(path, weights, verification, description, on_step)
            except ImportError as error:
                return CompileResult("unable", f"{error}: precision {weights} needs nncf (pip install nncf)")
            except QuantizeError as error:
                failures.append(f"{name}: {error}")
                continue
        if accurate is not None:
            on_step("write")
            (job.directory / TOKENIZER).write_text(accurate.tokenizer_json, encoding="utf-8")
            write_manifest(job.directory, job.recipe, accurate, made_by=name, probe=verification.probe_of(accurate))
            return CompileResult("done")
        inaccurate = True
        failures += [f"{name}: {reason}" for reason in reasons]
    return CompileResult("refused" if inaccurate else "unsupported", "; ".join(failures))


def _save(graph: Graph, path: Path, *, compress_to_fp16: bool = False) -> None:
    """Save a graph. OSError if the disk is too full, because OpenVINO would end the process."""
    constants = (node.output(0) for node in graph.get_ordered_ops() if node.get_type_name() == "Constant")
    size = sum(math.prod(each.get_shape()) * each.get_element_type().bitwidth // 8 for each in constants)
    require_space(path.with_suffix(".bin"), size // 2 if compress_to_fp16 else size)
    openvino().save_model(graph, path, compress_to_fp16=compress_to_fp16)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model to compile."""

    pipeline: BaseModel
    """The reference."""
    served: Served
    description: ModelDescription


def _load(job: CompileJob, export: str | None) -> _Loaded:
    """Load the pipeline of a job; with `export`, the part of it that the export does not contain."""
    spec = replace(job.spec, prompts=None)
    name, trusted = job.snapshot.repository, job.recipe.trust_remote_code
    plan = plan_pipeline(spec, job.snapshot, trust_remote_code=trusted)
    if export is not None:
        pipeline, description = load_prebuilt(plan, job.snapshot, export, trust_remote_code=trusted)
        served = Served(pipeline, description.arrays, description.normalize)
    else:
        pipeline, plan = load_pipeline(plan, job.snapshot, precision="fp32", device="cpu", trust_remote_code=trusted)
        served = serve_pipeline(pipeline, plan, Repository.of(job.snapshot, plan.route))
        description = describe(pipeline, served, plan, name, precision="fp32", device="cpu", backend="openvino")
    if pipeline.transformers_model is not None:
        # The key-value cache of a decoder would become part of the graph without being used.
        pipeline.transformers_model.config.use_cache = False
    if description.max_length > LONGEST_COMPARED:
        note = (
            f"compared with the reference on texts of up to {LONGEST_COMPARED} tokens, of the "
            f"{description.max_length} that it reads"
        )
        description = replace(description, notes=(*description.notes, note))
    return _Loaded(pipeline, served, description)


def _depends_on_padding(loaded: _Loaded) -> bool:
    try:
        return depends_on_padding(loaded.served.pipeline, loaded.description)
    except Exception as error:
        if is_temporary(error):
            raise
        raise _ReferenceError(f"the reference cannot compute texts: {describe_error(error)}") from error


def _reference_cases(loaded: _Loaded, corpus_s: float) -> list[Case]:
    """Compute the comparison texts with the reference, truncated to the maximum length of the comparison."""
    loaded.pipeline.max_seq_length = comparison_limit(loaded.description)
    try:
        compute = reference_of(loaded.pipeline, loaded.served, loaded.description)
        return make_cases(compute, loaded.description, corpus_s=corpus_s)
    except Exception as error:
        if is_temporary(error):
            raise
        raise _ReferenceError(f"the reference cannot compute the comparison texts: {describe_error(error)}") from error


def _complete_export(
    job: CompileJob, export: str, served: Served, description: ModelDescription, on_step: Callable[[str], None]
) -> tuple[Graph, ModelDescription]:
    """Return the graph of a repository that has only an export, and the description with the size of its vectors."""
    try:
        graph = prebuilt_exporter(job.snapshot, export)(served, on_step)
    except Exception as error:
        if is_temporary(error):
            raise
        raise UnsupportedModelError(f"{export} cannot be used: {describe_export_error(error)}") from error
    size = graph.outputs[0].get_partial_shape()[-1]
    return graph, replace(description, dimension=int(size.get_length())) if size.is_static else description


def _returning(graph: Graph) -> Exporter:
    return lambda _served, _on_step: graph


def _cases_of_export(job: CompileJob, graph: Graph, description: ModelDescription, corpus_s: float) -> list[Case]:
    """Embed the comparison texts with an export at fp32, because there are no weights to do it with."""
    path = job.directory / _REFERENCE_GRAPH
    _save(graph, path)
    backend = OpenVinoBackend(path, description, cpus=job.threads)
    try:
        cases = make_cases(Runner(backend), description, corpus_s=corpus_s)
    except Exception as error:
        if is_temporary(error):
            raise
        raise _ReferenceError(f"it cannot embed the comparison texts: {describe_export_error(error)}") from error
    finally:
        backend.close()
        for each in (path, path.with_suffix(".bin")):
            each.unlink()
    if not all(finite_rows(case.expected, len(case.texts)).all() for case in cases):
        raise _ReferenceError("some of its vectors are not finite at fp32")
    return cases


def _quantize(
    exact: Path,
    weights: QuantizedWeights,
    verification: _Verification,
    description: ModelDescription,
    on_step: Callable[[str], None],
) -> tuple[ModelDescription | None, list[str]]:
    """Quantize the exact graph, remove it, and measure the quantized one."""
    on_step(f"quantize to {weights}")
    graph = quantize(openvino().Core().read_model(exact), weights, description)
    on_step("save")
    quantized = exact.with_name(GRAPH)
    _save(graph, quantized)
    del graph
    for path in (exact, exact.with_suffix(".bin")):
        path.unlink()
    return verification.verify(quantized, replace(description, precision=weights), on_step)


class _ReferenceError(UnsupportedModelError):
    """The reference cannot embed the comparison texts, so that no graph can be compared."""


class _Verification:
    """Compares the graphs of a job with the reference, and chooses the precision that they compute in."""

    def __init__(
        self, job: CompileJob, embed: Callable[[], list[Case]], measure: Measure, *, has_reference: bool
    ) -> None:
        """Create the verification of a job.

        Args:
            job: The job.
            embed: Embeds the comparison texts with the reference.
            measure: See `build_artifact`.
            has_reference: Whether the reference is another one than the graph itself at fp32.
        """
        self._job = job
        self._embed = embed
        self._cases: list[Case] | None = None
        self._measure = measure
        self._has_reference = has_reference
        self._probes: dict[tuple[str, str | None], NDArray[np.float32]] = {}

    def embed_reference(self, on_step: Callable[[str], None]) -> None:
        """Embed the comparison texts once, and only when there is a graph: it takes longer than most exporters."""
        if self._cases is None:
            on_step("reference vectors")
            self._cases = self._embed()

    def probe_of(self, description: ModelDescription) -> NDArray[np.float32]:
        """Return the vector of the fixed input, as the graph that was last compared at this precision computes it."""
        return self._probes[description.precision, description.compute]

    def verify(
        self, graph: Path, description: ModelDescription, on_step: Callable[[str], None]
    ) -> tuple[ModelDescription | None, list[str]]:
        """Return the description at the precision in which a graph is accurate enough, and why others are not.

        The description is None if no precision is accurate enough. It contains the fastest options of the runtime.
        """
        compute = self._job.recipe.compute[0]
        tuning = Tuning()
        tunes = self._job.tune_s > 0 and graph.name != _EXACT_GRAPH
        if tunes:
            on_step("tune")
            described = replace(description, compute=compute)
            if compute == "int8":
                described = replace(described, activation_group=max(ACTIVATION_GROUPS))
            tuning = tune(graph, described, within_s=self._job.tune_s, cpus=self._job.threads)
        on_step("measure" if description.precision in ACCURACY_TARGETS else "verify")
        accurate, reasons = self._verify(graph, replace(description, tuning=tuning))
        if tuning != Tuning() and (accurate is None or (accurate.compute or accurate.precision) != compute):
            # The results differ by rounding from those with the default options, which may be accurate enough.
            accurate, reasons = self._verify(graph, description)
        if tunes and accurate is not None and accurate.compute == "int8":
            return self._require_gain(graph, description, accurate), reasons
        return accurate, reasons

    def _require_gain(self, graph: Path, description: ModelDescription, accurate: ModelDescription) -> ModelDescription:
        """Return the description of a model that computes in int8, or at the next precision if that is faster."""
        gain = measure_int8_gain(graph, accurate, within_s=self._job.tune_s, cpus=self._job.threads)
        if gain is not None and gain < 1:
            slower = replace(description, tuning=accurate.tuning)
            other, _ = self._first_accurate(graph, self._job.recipe.compute[1:], slower)
            if other is not None and other.compute is not None:
                note = (
                    f"computed in {other.compute}, because 8-bit activations are slower here ({gain:.2f} times as fast)"
                )
                return replace(other, notes=(*other.notes, note))
        return replace(accurate, tuning=replace(accurate.tuning, int8_gain=gain))

    def _verify(self, graph: Path, description: ModelDescription) -> tuple[ModelDescription | None, list[str]]:
        compute = self._job.recipe.compute
        if graph.name == _EXACT_GRAPH:
            # Before quantization the graph must be exact at fp32, so that a wrong conversion is not taken for the loss
            # of accuracy by quantization.
            return self._first_accurate(graph, ("fp32",), description)
        accurate, reasons = self._first_accurate(graph, compute, description)
        if accurate is not None or compute != ("bf16",):
            return accurate, reasons
        # bf16 was requested. If the graph is exact at fp32, the difference is that of bf16, whose floor is a setting of
        # the service.
        exact, more = self._first_accurate(graph, ("fp32",), description)
        if exact is None:
            return None, [*reasons, *more]
        try:
            fidelity = self._compare(graph, replace(description, precision="bf16"), exact=False)
        except MismatchError:  # not finite
            return replace(exact, notes=(*exact.notes, *(_note("fp32", reason) for reason in reasons))), reasons
        return replace(description, precision="bf16", fidelity=fidelity), reasons

    def _first_accurate(
        self, graph: Path, compute: Sequence[ComputePrecision], description: ModelDescription
    ) -> tuple[ModelDescription | None, list[str]]:
        """Return the description at the first precision that is accurate enough, and why those before it are not.

        Integer weights are only measured, because their floor is a setting of the service. But 8-bit activations are
        used only if they reach the accuracy target of the weights, with as many values per scale as possible.
        """
        reasons: list[str] = []
        target = ACCURACY_TARGETS.get(description.precision)
        for precision in compute:
            exact = replace(description, precision=precision)
            candidate = exact if target is None else replace(description, compute=precision)
            if precision == "fp32" and target is None and self._is_reference:
                return self._accept_reference(graph, candidate, reasons), reasons
            if target is not None and precision == "int8":
                measured, reason = self._first_accurate_group(graph, candidate, target)
            else:
                measured, reason = self._measure_at(graph, candidate, exact=target is None)
            if measured is not None:
                notes = (_note(precision, reason) for reason in reasons)
                return replace(measured, notes=(*description.notes, *notes)), reasons
            reasons.append(reason)
        return None, reasons

    def _first_accurate_group(
        self, graph: Path, description: ModelDescription, target: tuple[float, float]
    ) -> tuple[ModelDescription | None, str]:
        """Return the description with the most values per scale of an activation that reach a target, or why none do."""
        reason = ""
        for group in ACTIVATION_GROUPS:
            measured, reason = self._measure_at(graph, replace(description, activation_group=group), exact=False)
            if measured is None or measured.fidelity is None:
                continue
            if _reaches(measured.fidelity, *target):
                return measured, ""
            reached = ", ".join(f"{output} {value:.4f}" for output, value in measured.fidelity.agreement.items())
            reason = (
                f"with activations in 8 bits (agreement: {reached}; {measured.fidelity.top10_overlap or 0:.4f} of "
                f"neighbors kept; the targets are {target[0]} and {target[1]})"
            )
        return None, reason

    def _measure_at(
        self, graph: Path, description: ModelDescription, *, exact: bool
    ) -> tuple[ModelDescription | None, str]:
        """Return a description with its fidelity, or why its results are not those of the reference."""
        try:
            return replace(description, fidelity=self._compare(graph, description, exact=exact)), ""
        except MismatchError as error:
            return None, f"at {description.compute or description.precision}, {error}"

    @property
    def _is_reference(self) -> bool:
        return not self._has_reference and self._job.recipe.weights != "fp16"

    def _accept_reference(self, graph: Path, description: ModelDescription, reasons: Sequence[str]) -> ModelDescription:
        """Return the description at fp32 of a graph that has only itself to be compared with."""
        notes = [_note("fp32", reason) for reason in reasons]
        fidelity = self._compare(graph, description, exact=False)
        if fidelity.min_cosine is not None and fidelity.min_cosine < MIN_COSINE:
            notes.append(
                "the vector of a text depends on the other texts of its batch, as with activations that are quantized "
                f"while the model runs (lowest cosine {format_cosine(fidelity.min_cosine)})"
            )
        return replace(description, notes=(*description.notes, *notes), own_calibration=fidelity.calibration)

    def _compare(self, graph: Path, description: ModelDescription, *, exact: bool) -> Fidelity:
        backend = OpenVinoBackend(graph, description, cpus=self._job.threads)
        try:
            self._probes[description.precision, description.compute] = probe(backend)
            return self._measure(backend, self._cases or (), exact=exact)
        finally:
            backend.close()


def _note(precision: ComputePrecision, reason: str) -> str:
    return f"computed in {precision}, because it is not accurate enough {reason}"


def _reaches(fidelity: Fidelity, min_cosine: float, min_overlap: float) -> bool:
    """Return whether dense vectors reach both targets, and other outputs the second one."""
    kept = 1.0 if fidelity.top10_overlap is None else fidelity.top10_overlap
    least = {name: min_cosine if name == "dense" else min_overlap for name in fidelity.agreement}
    return kept >= min_overlap and all(value >= least[name] for name, value in fidelity.agreement.items())
