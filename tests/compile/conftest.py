"""Artifacts of the small families, each compiled once per session, in this process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.artifacts.compile_job import Job
from emb_model_provider.artifacts.manifest import GRAPH, read_artifact
from emb_model_provider.artifacts.recipe import recipe_for
from emb_model_provider.backends.hardware import fast_int8, native_bf16
from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
from emb_model_provider.compiler.build import make
from emb_model_provider.compiler.export import quietly
from emb_model_provider.fidelity.texts import corpus
from tests.compile.service import FAMILY, Service
from tests.models import FAMILIES, bundled_directory, snapshot_of, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.artifacts.manifest import Artifact


@dataclass(frozen=True)
class Compiled:
    """A model's directory, and its artifact."""

    directory: Path
    artifact: Artifact
    phases: list[str]

    def load(self, *, cpus: int = 2) -> OpenVinoBackend:
        return OpenVinoBackend(self.artifact.directory / GRAPH, self.artifact.description, cpus=cpus)


def compile_here(directory: Path, place: Path, **spec: Any) -> tuple[Any, list[str]]:
    """Run the child's work in this process; return its result and the phases that it told."""
    asked, snapshot = spec_of(**spec), snapshot_of(directory)
    recipe = recipe_for(
        asked, snapshot, trust_remote_code=False, native_bf16=native_bf16(), fast_int8=fast_int8()
    )
    place.mkdir(parents=True, exist_ok=True)
    job = Job(spec=asked, snapshot=snapshot, recipe=recipe, directory=place, threads=2, parent=os.getpid())
    phases: list[str] = []
    with quietly():
        result = make(job, phases.append)
    return result, phases


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Compiled]:
    """Return a function that gives a family's artifact (or that of `bundled`), by its name and its spec."""
    root = tmp_path_factory.mktemp("compiled")
    made: dict[tuple[Any, ...], Compiled] = {}

    def get(name: str, **spec: Any) -> Compiled:
        wanted = (name, *sorted(spec.items()))
        if wanted not in made:
            directory = root / name if name != "bundled" else bundled_directory()
            if not directory.exists():
                FAMILIES[name](directory)
            place = root / f"artifact-{len(made)}"
            with pytest.MonkeyPatch.context() as patch:
                if name != "bundled" or spec.get("precision") in ("fp32", "fp16"):
                    # What is measured is tested with the bundled model at the other precisions.
                    patch.setattr("emb_model_provider.fidelity.compare.corpus", lambda _share=0.0: corpus(0))
                result, phases = compile_here(directory, place, **spec)
            assert result.outcome == "done", result
            artifact = read_artifact(place)
            assert artifact is not None
            made[wanted] = Compiled(directory, artifact, phases)
        return made[wanted]

    return get


@pytest.fixture
def service(compiled: Callable[..., Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    return Service(compiled(FAMILY, precision="fp32"), tmp_path, monkeypatch)
