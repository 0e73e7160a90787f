"""Compiled models for the tests of artifacts, compiler and fidelity; and a preparer over a fake compiler."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from emb_model_provider.artifacts.compiler_process import CompileJob
from emb_model_provider.artifacts.manifest import GRAPH, read_artifact
from emb_model_provider.artifacts.prepare import BackendPreparer, CompileLimits
from emb_model_provider.artifacts.recipe import recipe_for
from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.hardware import fast_int8, native_bf16
from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
from emb_model_provider.compiler.build import build_artifact
from emb_model_provider.compiler.export import EXPORTERS
from emb_model_provider.fidelity.cases import CORPUS_S
from emb_model_provider.fidelity.compare import compare
from emb_model_provider.settings import FidelitySettings, HubSettings, TrustSettings
from tests.kind_models import ONE_OF_EACH
from tests.models import FAMILIES, bundled_directory, snapshot_of, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import pytest

    from emb_model_provider.artifacts.compiler_process import CompileResult
    from emb_model_provider.artifacts.manifest import Artifact
    from emb_model_provider.artifacts.prepare import PreparedBackend
    from emb_model_provider.backends.base import Backend, ModelDescription
    from emb_model_provider.compiler.build import Measure
    from emb_model_provider.compiler.export import Exporter
    from emb_model_provider.progress import CancelToken, Progress, WorkRecord

T = TypeVar("T")

FAMILY = "bert-mean-normalize"
ONE_TOKEN = TokenBatch(ids=[[5]], prompt_lengths=[0])


def compile_here(
    directory: Path,
    artifact: Path,
    *,
    exporters: Mapping[str, Exporter] = EXPORTERS,
    corpus_s: float = 0.0,
    bf16: bool | None = None,
    int8: bool = False,
    measure: Measure = compare,
    tune_s: float = 0,
    **spec: Any,
) -> tuple[CompileResult, list[str]]:
    """Compile a model in this process, by default with the smallest part of the corpus.

    Args:
        directory: The model.
        artifact: The directory to write to.
        exporters: See `build_artifact`.
        corpus_s: See `build_artifact`.
        bf16: Whether the processor is to have native bf16; None for what this one has.
        int8: Whether the processor is to be fast at int8.
        measure: See `build_artifact`.
        tune_s: See `CompileJob`.
        spec: Values of the spec.

    Returns:
        The result, and the names of the steps.
    """
    requested, snapshot = spec_of(**spec), snapshot_of(directory)
    recipe = recipe_for(
        requested,
        snapshot,
        trust_remote_code=False,
        native_bf16=native_bf16() if bf16 is None else bf16,
        fast_int8=int8,
    )
    artifact.mkdir(parents=True, exist_ok=True)
    job = CompileJob(spec=requested, snapshot=snapshot, recipe=recipe, directory=artifact, threads=2, tune_s=tune_s)
    steps: list[str] = []
    with warnings.catch_warnings(action="ignore"):
        result = build_artifact(job, steps.append, exporters=exporters, corpus_s=corpus_s, measure=measure)
    return result, steps


@dataclass(frozen=True)
class Compiled:
    """A model's directory, its artifact, and the steps of compiling it."""

    directory: Path
    artifact: Artifact
    steps: list[str]

    @property
    def description(self) -> ModelDescription:
        return self.artifact.description

    def load(self, *, cpus: int = 2) -> OpenVinoBackend:
        return OpenVinoBackend(self.artifact.directory / GRAPH, self.description, cpus=cpus)


class CompiledModels:
    """Compiles each model once for all tests of a run, also if they run in several processes."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._models: dict[str, Compiled] = {}

    def __call__(self, name: str, *, precision: str = "fp32") -> Compiled:
        """Return a compiled model.

        The bundled model is compiled for this processor, and at auto, int8 and int4 compared on the whole corpus.

        Args:
            name: A name of `FAMILIES` or `ONE_OF_EACH`, or `bundled`.
            precision: The requested precision.
        """
        key = f"{name}-{precision}"
        if key not in self._models:
            with FileLock(self._root / f"{key}.lock"):
                self._models[key] = self._compile(name, precision, self._root / key)
        return self._models[key]

    def directory(self, name: str) -> Path:
        """Return the directory of a model, which is not to be changed."""
        if name == "bundled":
            return bundled_directory()
        directory = self._root / name
        with FileLock(self._root / f"{name}.lock"):
            if not directory.exists():
                {**FAMILIES, **ONE_OF_EACH}[name](directory)
        return directory

    def _compile(self, name: str, precision: str, place: Path) -> Compiled:
        directory = self.directory(name)
        steps = place.with_suffix(".steps.json")
        if not steps.exists():
            whole = name == "bundled" and precision not in ("fp32", "fp16")
            result, names = compile_here(
                directory,
                place,
                corpus_s=CORPUS_S if whole else 0.0,
                int8=name == "bundled" and fast_int8(),
                precision=precision,
            )
            assert result.outcome == "done", result
            steps.write_text(json.dumps(names))
        artifact = read_artifact(place)
        assert artifact is not None
        return Compiled(directory, artifact, json.loads(steps.read_text()))


@cache
def compiled_models(base: Path) -> CompiledModels:
    """Return the compiled models of a test run.

    Args:
        base: The temporary directory of the run.
    """
    # With several workers, the directory of each one is in that of the run.
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    root.mkdir(exist_ok=True)
    return CompiledModels(root)


@dataclass
class Harness:
    """Prepares one small model as the service does, with a fake compiler that copies an artifact."""

    compiled: Compiled
    root: Path
    monkeypatch: pytest.MonkeyPatch
    max_artifacts_gb: float = 1.0
    compile_timeout_s: float = 0
    limits: CompileLimits = field(default_factory=CompileLimits)
    progress: list[Progress] = field(default_factory=list)
    work: list[WorkRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = self.root / "cache"
        self.starts_file = self.root / "starts"
        self.directory = self.compiled.directory
        self.monkeypatch.setattr(
            "emb_model_provider.artifacts.compiler_process.COMMAND",
            (sys.executable, "-m", "tests.artifacts.fake_compiler"),
        )
        self.configure_compiler()

    def configure_compiler(self, **options: Any) -> None:
        """Set the options of the fake compiler for the next starts; see `fake_compiler`."""
        defaults = {"copy": str(self.compiled.artifact.directory), "log": str(self.starts_file)}
        self.monkeypatch.setenv("FAKE_COMPILER", json.dumps({**defaults, **options}))

    @property
    def starts(self) -> int:
        """How often the compiler was started."""
        return len(self.starts_file.read_text().splitlines()) if self.starts_file.exists() else 0

    @property
    def artifacts(self) -> list[Path]:
        return sorted(path for path in (self.cache / "artifacts").iterdir() if path.is_dir())

    def prepare(
        self,
        *,
        cancel: CancelToken | None = None,
        floors: Mapping[str, float] | None = None,
        agreement_floors: Mapping[str, float] | None = None,
        measure: bool = True,
        **spec: Any,
    ) -> PreparedBackend:
        """Prepare the model.

        Args:
            cancel: See `BackendPreparer.prepare`.
            floors: FIDELITY_FLOORS.
            agreement_floors: AGREEMENT_FLOORS.
            measure: MEASURE_FIDELITY.
            spec: Values of the spec.
        """
        fidelity = FidelitySettings(
            fidelity_floors=dict(floors or {}), agreement_floors=dict(agreement_floors or {}), measure_fidelity=measure
        )
        return self.preparer(fidelity).prepare(
            spec_of(**spec), snapshot_of(self.directory), on_progress=self.progress.append, cancel=cancel
        )

    def preparer(self, fidelity: FidelitySettings | None = None) -> BackendPreparer:
        return BackendPreparer(
            HubSettings(
                cache_dir=self.cache, max_artifacts_gb=self.max_artifacts_gb, compile_timeout_s=self.compile_timeout_s
            ),
            fidelity or FidelitySettings(),
            TrustSettings(),
            self.limits,
            on_work=self.work.append,
        )

    def is_compiled_later(self, **spec: Any) -> bool:
        return self.preparer().is_compiled_later(spec_of(**spec), snapshot_of(self.directory))

    def load(self, **options: Any) -> Backend:
        """Prepare and load the model."""
        return self.prepare(**options).load()

    def describe(self, **options: Any) -> ModelDescription:
        """Prepare and load the model, embed one token, and return the description of the model."""
        backend = self.load(**options)
        try:
            assert backend.run(ONE_TOKEN).dense.shape == (1, 48)
            return backend.description
        finally:
            backend.close()


def wait_for(condition: Callable[[], T]) -> T:
    """Return the first true value of a condition, for which it waits up to 60 seconds."""
    end = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < end, "the condition was not met"
        time.sleep(0.02)
    return value
