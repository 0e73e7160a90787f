"""Compares what is served with sentence-transformers, family by family, on both backends at fp32.

Each family is a small directory with random weights (`benchmarks.family_models`). Its results are compared on texts from
one token to several times the maximum length, alone and in mixed batches, with every prompt. The exit status is 1 if a
family has other results, or is refused although it should be served, or the other way round.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import logging
import multiprocessing
import sys
import tempfile
import textwrap
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from benchmarks.report import NONE, describe_run, log_progress, markdown_table
from emb_model_provider.errors import ProviderError
from emb_model_provider.fidelity.compare import cosines
from emb_model_provider.formatting import describe_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from multiprocessing.connection import Connection

    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

    from benchmarks.family_models import Family
    from emb_model_provider.artifacts.compiler_process import CompileJob, CompileResult
    from emb_model_provider.backends.base import (
        Backend,
        Fidelity,
        ModelDescription,
        OutputName,
        Outputs,
        SparseVector,
        TokenBatch,
    )
    from emb_model_provider.fidelity.cases import Case
    from emb_model_provider.model_spec import BackendName, Kind, ModelSpec
    from emb_model_provider.settings import HubSettings
    from emb_model_provider.snapshots.snapshot import Snapshot

    Vectors = NDArray[np.float32]

BACKENDS = ("torch", "openvino")
MIN_COSINE = 0.9999
MAX_DIFFERENCE, MAX_ERROR, MIN_OVERLAP = 1e-3, 1e-4, 0.99
"""Of a logit; of dot products of sparse vectors and MaxSim scores, relative to the length of the vectors; and the lowest
share of the strongest terms. Of terms with nearly equal weights, another one can be the last of them."""
MAX_SIMILARITY = 0.99
"""If two different texts have more similar reference vectors than this, a comparison proves nothing."""
TIMEOUT_S = 180.0
"""For each step of a family: some models take many minutes to compile."""
TEXTS = (
    "a",
    "hello world",
    "The quick brown fox jumps over the lazy dog.",
    "How do I reset my password? 😀",
    "今天天气很好，我们去公园散步。",
    "向量检索 mixed with English words",
    "🚀🎉👍🏽😂",
    "",
    "   \n\t ",
    "nul\0inside",
    "Embedding models turn text into vectors that can be compared. " * 12,
    "如何重置我的密码？" * 40,
    "x" * 700,
)
"""From one token to several times the maximum length: Chinese, emoji, empty, blank and unusual texts."""
QUERY = "how do I reset it?"
"""The query of all pairs."""
DISTINCT = (0, 1, 2, 3, 4, 5, 10, 11)
"""Indexes of texts whose vectors must differ."""
_BATCHES = (1, 5)
_EXIT_S = 2.0
_NORM_TOLERANCE = 1e-3
_CELL_CHARS = 120


COLUMNS: Mapping[OutputName, Mapping[str, str]] = {
    "dense": {"cosine": "lowest cosine"},
    "scores": {"max_difference": "largest difference of a logit", "spearman": "lowest rank correlation"},
    "sparse": {"term_overlap": "strongest terms kept", "score_error": "largest error of a dot product"},
    "multi_vector": {"min_cosine": "lowest cosine of a token", "maxsim_error": "largest error of MaxSim"},
}
"""The figures of each output, and what tables call them."""
OUTPUTS: Mapping[Kind, tuple[OutputName, ...]] = {
    "dense": ("dense",),
    "reranker": ("scores",),
    "classifier": ("scores",),
    "sparse": ("sparse",),
    "multi-vector": ("multi_vector",),
    "bge-m3": ("dense", "sparse", "multi_vector"),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one backend did with a family."""

    status: Literal["compared", "refused", "torch", "invalid", "error"]
    """torch: it could not be compiled, so that the torch backend serves it. error: it can neither be served nor is it
    refused with a reason."""
    cosine: float | None = None
    """The lowest one of dense vectors to the reference."""
    reason: str = ""
    fidelity: Fidelity | None = None
    """The comparison of other outputs."""

    def fails(self, expect: str) -> bool:
        if self.status == "compared":
            return expect != "equal" or bool(self.reason) or not self._is_equal
        return self.status in ("invalid", "error") or (self.status == "refused") != (expect == "refused")

    @property
    def _is_equal(self) -> bool:
        results: list[bool] = []
        if self.cosine is not None:
            results.append(self.cosine >= MIN_COSINE)
        if self.fidelity is not None and (scores := self.fidelity.scores) is not None:
            results += [scores.max_difference <= MAX_DIFFERENCE, scores.spearman >= MIN_COSINE]
        if self.fidelity is not None and (sparse := self.fidelity.sparse) is not None:
            results += [sparse.term_overlap >= MIN_OVERLAP, sparse.score_error <= MAX_ERROR]
        if self.fidelity is not None and (tokens := self.fidelity.multi_vector) is not None:
            results += [tokens.min_cosine >= MIN_COSINE, tokens.maxsim_error <= MAX_ERROR]
        return bool(results) and all(results)

    def cells(self, output: OutputName) -> list[str]:
        """Return the figures of an output, or once why there are none."""
        first_sentence = self.reason.replace("|", "\\|").partition(". ")[0]
        reason = textwrap.shorten(first_sentence, _CELL_CHARS, placeholder=" …")
        if self.status != "compared":
            return [f"{self.status}: {reason}", *[""] * (len(COLUMNS[output]) - 1)]
        figures = [self.cosine or 0.0]
        if output != "dense" and self.fidelity is not None:
            measured = getattr(self.fidelity, output)
            figures = [getattr(measured, name) for name in COLUMNS[output]]
        cells = [_format_figure(figure) for figure in figures]
        return [f"{cells[0]} ({reason})" if reason else cells[0], *cells[1:]]


@dataclass(frozen=True, slots=True)
class Row:
    """A family and its outcomes."""

    family: str
    kind: Kind
    expect: Literal["equal", "refused"]
    layout: str
    outcomes: dict[str, Outcome]
    """By backend."""

    @property
    def failures(self) -> list[str]:
        return [backend for backend, outcome in self.outcomes.items() if outcome.fails(self.expect)]


@dataclass(frozen=True, slots=True)
class Expected:
    """The reference vectors of a family."""

    vectors: Mapping[tuple[str | None, str | None], Vectors]
    """Vectors of `TEXTS` by task and prompt. The task is None for models without routes; a prompt that is None is the
    default prompt of the model. NaN for a text that the reference cannot embed: some models fail for a text without
    tokens."""
    note: str = ""
    """Said if the vectors that are served differ."""


class Difference(Exception):  # noqa: N818 - it is a result
    """Vectors cannot be compared with the reference at all."""


# --- in the worker process ------------------------------------------------------------------------------


class Evaluation:
    """A family that was written to a directory, and the comparisons of its vectors."""

    def __init__(self, name: str, family: Family, root: Path) -> None:
        self._family = family
        self._root = root
        self._directory = root / name.replace("+", "-")
        family.build(self._directory)
        self.layout = layout_of(self._directory)
        self._expected: Expected | None = None

    def run(self, backend: str) -> Outcome:
        """Load the family with a backend, and compare it. Never raises."""
        outcome = self._run(backend)
        return replace(outcome, reason=outcome.reason.replace(str(self._directory), self._directory.name))

    def _run(self, backend: str) -> Outcome:
        from emb_model_provider.artifacts.prepare import BackendPreparer
        from emb_model_provider.settings import FidelitySettings, HubSettings, TrustSettings

        hubs = HubSettings(cache_dir=self._root / "cache", offline=True)
        preparer = BackendPreparer(hubs, FidelitySettings(), TrustSettings())
        try:
            spec = self._spec("torch" if backend == "torch" else "auto")
            prepared = preparer.prepare(spec, self._snapshot(spec, hubs))
            if prepared.backend not in (backend, "numpy"):  # numpy: static embeddings
                # The beginnings of the notes only say that it is served by the torch backend.
                return Outcome(
                    "torch", reason="; ".join(note.partition("OpenVINO: ")[2] or note for note in prepared.notes)
                )
            return self._compare(prepared.load())
        except ProviderError as error:
            return Outcome("refused", reason=describe_error(error))
        except Difference as error:
            return Outcome("invalid", reason=str(error))
        except Exception as error:
            logging.getLogger(__name__).debug("%s failed", backend, exc_info=True)
            return Outcome("error", reason=describe_error(error))

    def _spec(self, backend: BackendName) -> ModelSpec:
        from emb_model_provider.model_spec import ModelSpec

        return ModelSpec(
            alias="small",
            name=self._family.repository,
            path=self._directory,
            source="local",
            device="cpu",
            precision="fp32",
            backend=backend,
            max_length=self._family.max_length,
        )

    def _snapshot(self, spec: ModelSpec, hubs: HubSettings) -> Snapshot:
        """Return the files that the server would read."""
        from emb_model_provider.hubs.fetch import fetch_snapshot

        return replace(fetch_snapshot(spec, hubs), repository=self._family.repository)

    def _compare(self, backend: Backend) -> Outcome:
        try:
            if self._family.expect == "refused":
                return Outcome("compared", reason="served, not refused")
            if self._family.kind != "dense":
                return compare_outputs(backend, reference_cases(self._family, self._directory, backend.description))
            if self._expected is None:
                self._expected = reference_vectors(self._family, self._directory)
            return compare(backend, self._expected)
        finally:
            backend.close()


def reference_vectors(family: Family, directory: Path) -> Expected:
    """Return the reference vectors of `TEXTS`, computed text by text.

    Raises:
        Difference: Different texts have nearly the same vector.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router

    if family.reference is not None:
        expected = Expected({(None, None): family.reference(directory, TEXTS)})
    else:
        model = SentenceTransformer(
            str(directory), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
        )
        prompts = {text: name for name, text in model.prompts.items() if text}
        if any(isinstance(module, Router) for module in model):
            vectors = {(task, ""): _encode_alone(model, task=task, prompt="") for task in ("query", "document")}
        else:
            vectors = {(None, prompt): _encode_alone(model, prompt_name=name) for prompt, name in prompts.items()}
            vectors[None, None] = _encode_alone(model)
            if model.default_prompt_name is not None:
                vectors[None, ""] = _encode_alone(model, prompt="")
        expected = Expected(vectors, _padding_note(model))
    similar = max(highest_similarity(vectors[list(DISTINCT)]) for vectors in expected.vectors.values())
    if similar >= MAX_SIMILARITY:
        raise Difference(f"different texts have reference vectors with a cosine of {similar:.4f}")
    return expected


def _padding_note(model: SentenceTransformer) -> str:
    """Return a note if the vectors of sentence-transformers depend on the other texts of a batch."""
    together = model.encode(list(TEXTS), batch_size=_BATCHES[-1], show_progress_bar=False)
    lowest = float(np.nanmin(cosines(together, _encode_alone(model))))
    return f"sentence-transformers itself differs in a batch: {lowest:.4f}" if lowest < MIN_COSINE else ""


def _encode_alone(model: SentenceTransformer, **options: Any) -> Vectors:
    rows: list[Vectors | None] = []
    for text in TEXTS:
        try:
            rows.append(model.encode(text, show_progress_bar=False, **options))
        except (IndexError, RuntimeError):
            rows.append(None)
    missing = np.full_like(next(row for row in rows if row is not None), np.nan)
    return np.stack([missing if row is None else row for row in rows])


def compare(backend: Backend, expected: Expected) -> Outcome:
    """Return the lowest cosine of the vectors of a backend to the expected ones, alone and in mixed batches.

    Raises:
        Difference: The vectors have another size.
    """
    lowest, reasons = 1.0, set()
    for (task, prompt), theirs in expected.vectors.items():
        known = np.isfinite(theirs).all(axis=1)
        for size in _BATCHES:
            ours = served_vectors(backend, task, prompt, batch_size=size)
            if ours.shape != theirs.shape:
                raise Difference(f"vectors have {ours.shape[1]} values, those of the reference {theirs.shape[1]}")
            if not np.isfinite(ours).all():
                reasons.add("vectors that are not finite")
            similar = np.where(known, cosines(ours, theirs), 1.0)
            worst = int(similar.argmin())
            lowest = min(lowest, float(similar[worst]))
            how = "alone" if size == 1 else "in a batch"
            if not similar[worst] >= MIN_COSINE:
                reasons.add(f"{how}: {TEXTS[worst][:16]!r}{f' after {prompt!r}' if prompt else ''}")
            norms, their_norms = (np.linalg.norm(vectors[known], axis=1) for vectors in (ours, theirs))
            if not np.allclose(norms, their_norms, rtol=_NORM_TOLERANCE, atol=1e-6):
                reasons.add("other norms")
    if reasons and expected.note:
        reasons.add(expected.note)
    return Outcome("compared", lowest, "; ".join(sorted(reasons)))


def served_vectors(backend: Backend, task: str | None, prompt: str | None, *, batch_size: int) -> Vectors:
    """Tokenize `TEXTS`, embed and normalize them as serving does; a prompt that is None is the model's default."""
    from emb_model_provider.backends.base import TokenBatch
    from emb_model_provider.backends.tokenization import Tokenization

    whole = backend.description
    route = whole if task is None else whole.routes[task]
    if prompt is None:
        prompt = whole.prompts[whole.default_prompt] if whole.default_prompt else ""
    encoded = Tokenization(route).encode(TEXTS, prompt=prompt)
    parts = []
    for start in range(0, len(TEXTS), batch_size):
        ids = encoded.ids[start : start + batch_size]
        lengths = encoded.prompt_lengths[start : start + batch_size]
        tasks = [task] * len(ids) if task is not None else None
        parts.append(backend.run(TokenBatch(ids=ids, prompt_lengths=lengths, tasks=tasks)).dense)
    vectors = np.concatenate(parts)
    if route.normalize:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def reference_cases(family: Family, directory: Path, description: ModelDescription) -> list[Case]:
    """Return `TEXTS` with the results of the library that defines a kind, each input computed alone.

    Raises:
        Difference: Different texts have nearly the same score.
    """
    from emb_model_provider.backends.base import Outputs
    from emb_model_provider.fidelity.cases import Case
    from tests import kind_checks

    match family.kind:
        case "reranker":
            pairs = [(QUERY, text) for text in TEXTS]
            scores = (family.scores or kind_checks.expected_scores)(directory, pairs)
            _require_spread(scores)
            return [Case(pairs, "", Outputs(scores=scores))]
        case "classifier":
            scores = kind_checks.expected_labels(directory, TEXTS)
            _require_spread(scores)
            return [Case(TEXTS, "", Outputs(scores=scores))]
        case "sparse":
            tasks: list[str | None] = ["query", "document"] if description.routes else [None]
            return [
                Case(TEXTS, "", Outputs(sparse=_nonzero(kind_checks.expected_terms(directory, TEXTS, task))), task=task)
                for task in tasks
            ]
        case "multi-vector":
            return [
                Case(
                    TEXTS,
                    description.prompts.get(task, ""),
                    Outputs(multi_vector=kind_checks.expected_token_vectors(directory, TEXTS, task)),
                    task=task,
                )
                for task in ("query", "document")
            ]
    return [Case(TEXTS, "", kind_checks.expected_bge_m3(directory, TEXTS))]


def _require_spread(scores: NDArray[np.float32]) -> None:
    if (spread := float(np.ptp(scores, axis=0).min())) < 0.1:
        raise Difference(f"different texts have logits within {spread:.4f}")


def _nonzero(weights: NDArray[np.float32]) -> list[SparseVector]:
    from emb_model_provider.backends.base import SparseVector

    indices = [np.flatnonzero(row).astype(np.int32) for row in weights]
    return [SparseVector(kept, row[kept]) for kept, row in zip(indices, weights, strict=True)]


def compare_outputs(backend: Backend, cases: Sequence[Case]) -> Outcome:
    """Return how close the outputs of a backend are to the expected ones, alone and in mixed batches.

    Raises:
        Difference: They have another size.
    """
    from emb_model_provider.backends.routes import RoutedBackend
    from emb_model_provider.fidelity.compare import MismatchError
    from emb_model_provider.fidelity.compare import compare as measure

    try:
        if isinstance(backend, RoutedBackend):
            parts = [measure(_Route(backend, case.task or ""), [case], exact=False) for case in cases]
            fidelity = max(parts, key=lambda part: part.sparse.score_error if part.sparse is not None else 0.0)
        else:
            fidelity = measure(backend, cases, exact=False)
    except MismatchError as error:
        raise Difference(str(error)) from error
    return Outcome("compared", fidelity.min_cosine, fidelity=fidelity)


class _Route:
    """One route of an asymmetric backend, with its own tokenization."""

    streams, memory_bytes = 1, 0

    def __init__(self, backend: Backend, task: str) -> None:
        self._backend = backend
        self.description = backend.description.routes[task]

    def run(self, batch: TokenBatch) -> Outputs:
        return self._backend.run(batch)

    run_fp32 = run

    def close(self) -> None:
        self._backend.close()


def _format_figure(value: float) -> str:
    """Return a small difference with two digits, and a share truncated, so that 0.99999999 is not shown as 1."""
    return f"{value:.1e}" if value < MAX_DIFFERENCE else f"{np.trunc(value * 1e7) / 1e7:.7f}"


def highest_similarity(vectors: Vectors) -> float:
    """Return the highest cosine between two different rows."""
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    return float(np.max(units @ units.T - 2 * np.eye(len(units))))


def layout_of(directory: Path) -> str:
    """Return the modules of a directory, such as `Transformer, Pooling (mean), Normalize`."""
    path = directory / "modules.json"
    if not path.exists():
        candidates = ("configuration.json", "adapter_config.json", "config.json")
        names = [name for name in candidates if (directory / name).exists()]
        return f"{names[0]} only" if names else NONE
    parts = []
    for module in json.loads(path.read_text(encoding="utf-8")):
        kind = str(module["type"]).rpartition(".")[2]
        config = directory / str(module["path"]) / "config.json"
        if kind == "Pooling" and config.exists():
            values = json.loads(config.read_text(encoding="utf-8"))
            mode = values.get("pooling_mode") or [
                key.removeprefix("pooling_mode_").partition("_")[0]
                for key, value in values.items()
                if key.startswith("pooling_mode_") and value is True
            ]
            kind += f" ({mode if isinstance(mode, str) else '+'.join(mode)})"
        parts.append(kind)
    return ", ".join(parts)


def compile_here(job: CompileJob, *_: object, **__: object) -> CompileResult:
    """Compile in this process, because a new one would import torch for each family."""
    from emb_model_provider.compiler.build import build_artifact

    return build_artifact(job, lambda _: None, corpus_s=0.0)


def work(connection: Connection, root: str) -> None:
    """Evaluate each family that is named on the connection: send its layout, each outcome, and then None."""
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]  # transformers would import it for ten seconds
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    import torch
    import transformers

    from benchmarks.family_models import FAMILIES
    from emb_model_provider.artifacts import prepare

    prepare.run_compiler = compile_here
    torch.set_num_threads(2)
    transformers.utils.logging.disable_progress_bar()
    connection.send({name: (family.kind, family.expect) for name, family in FAMILIES.items()})
    while (request := connection.recv()) is not None:
        name, backends = request
        with tempfile.TemporaryDirectory(dir=root) as directory:
            try:
                evaluation = Evaluation(name, FAMILIES[name], Path(directory))
            except Exception as error:  # noqa: BLE001 - one family must not stop the others
                connection.send(f"cannot be built: {describe_error(error)}")
                connection.send(None)
                continue
            connection.send(evaluation.layout)
            for backend in backends:
                connection.send((backend, evaluation.run(backend)))
        connection.send(None)


# --- in the main process ----------------------------------------------------------------------------------


class Worker:
    """A process that evaluates families. One that crashes or hangs is replaced."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._process: Any = None
        self._connection: Any = None
        self._start()

    def evaluate(self, name: str, backends: Sequence[str]) -> Row:
        (kind, expect), layout = self.families[name], ""
        outcomes: dict[str, Outcome] = {}
        try:
            if self._process is None:
                self._start()
            self._connection.send((name, backends))
            layout = self._receive()
            if layout.startswith("cannot be built"):
                self._receive()
                return Row(name, kind, expect, NONE, {backend: Outcome("error", reason=layout) for backend in backends})
            while (message := self._receive()) is not None:
                backend, outcome = message
                outcomes[backend] = outcome
        except TimeoutError:
            self.close()
            missing = next(backend for backend in backends if backend not in outcomes)
            status: Literal["torch", "error"] = "torch" if missing == "openvino" else "error"
            outcomes[missing] = Outcome(status, reason=f"no result within {TIMEOUT_S:g} s")
        except (EOFError, OSError):
            self.close()
        for backend in backends:
            outcomes.setdefault(backend, Outcome("error", reason="the process crashed"))
        return Row(name, kind, expect, layout, outcomes)

    def close(self) -> None:
        """End the process: at once if it is busy, gracefully if it waits for a family."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._connection.send(None)
            self._process.join(_EXIT_S)
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = self._connection = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=work, args=(other, str(self._root)), daemon=True)
        self._process.start()
        other.close()
        self.families: dict[str, tuple[Kind, Literal["equal", "refused"]]] = self._receive()
        """The kind of each family, and what is expected of it. Asked of the process, because only that imports torch."""

    def _receive(self) -> Any:
        if not self._connection.poll(TIMEOUT_S):
            raise TimeoutError
        return self._connection.recv()


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_options(arguments)
    backends = BACKENDS if options.backend == "both" else (options.backend,)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="benchmarks-families-") as root:
        worker = Worker(Path(root))
        patterns = options.family or ["*"]
        names = [name for name in worker.families if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        try:
            for name in names:
                row = worker.evaluate(name, backends)
                rows.append(row)
                cells = "; ".join(
                    f"{backend} {' '.join(outcome.cells(output))}"
                    for backend, outcome in row.outcomes.items()
                    for output in OUTPUTS[row.kind]
                )
                log_progress(f"{len(rows)}/{len(names)} {'FAILED ' if row.failures else ''}{name}: {cells}")
        finally:
            worker.close()
    if not rows:
        print(f"No family matches. The families are: {', '.join(worker.families)}", file=sys.stderr)
        return 2
    if options.json:
        contents = json.dumps([asdict(row) for row in rows], ensure_ascii=False, indent=1)
        options.json.write_text(contents, encoding="utf-8")
    print(report(rows, backends))
    return exit_status(rows)


def report(rows: Sequence[Row], backends: Sequence[str]) -> str:
    """Return the description of the run, the table, and the families that failed."""
    failed = [row for row in rows if row.failures]
    notes = [f"Families: {len(rows)}, {len(failed)} failed", f"Texts: {len(TEXTS)}, alone and in batches"]
    tables = [output_table(rows, backends, output) for output in COLUMNS]
    return "\n\n".join([describe_run("benchmarks.families", notes), *filter(None, tables)])


def output_table(rows: Sequence[Row], backends: Sequence[str], output: OutputName) -> str:
    """Return the table of the families that have an output, with its figures on each backend; empty if there is none."""
    shown = [row for row in rows if output in OUTPUTS[row.kind]]
    head = ["family", "modules", *(f"{title}, {backend}" for backend in backends for title in COLUMNS[output].values())]
    table = markdown_table(head, table_rows(shown, backends, output))
    return table.replace(" ---:", " ---") if shown else ""  # because the cells are texts


def table_rows(rows: Iterable[Row], backends: Sequence[str], output: OutputName = "dense") -> Iterator[list[str]]:
    """Return the cells of each row. Those of failures are bold."""
    for row in rows:
        cells: list[str] = []
        for backend in backends:
            figures = row.outcomes[backend].cells(output)
            if backend in row.failures:
                figures = [f"**{figure}**" if figure else "" for figure in figures]
            if figures[0] in cells and figures[0].startswith("refused"):
                figures[0] = "refused"
            cells += figures
        yield [row.family, row.layout, *cells]


def exit_status(rows: Iterable[Row]) -> int:
    return int(any(row.failures for row in rows))


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.add_argument("--family", action="append", metavar="NAME",
                        help="a family, or a pattern such as 'qwen*'; can be repeated (default: all)")  # fmt: skip
    parser.add_argument("--backend", choices=[*BACKENDS, "both"], default="both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to a file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
