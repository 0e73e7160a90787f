"""Artifacts, refusals and measured fidelity, which are listed, verified and removed with their snapshot."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from emb_model_provider.artifacts.compiler_process import CompileResult
from emb_model_provider.artifacts.manifest import FILES, GRAPH, write_manifest
from emb_model_provider.artifacts.store import ArtifactStore
from emb_model_provider.backends.base import ModelDescription
from emb_model_provider.errors import ModelInUseError
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.model_resolver import resolve_model
from emb_model_provider.progress import CancelToken, Progress
from tests.hubs.conftest import HF_REPO, MS_REPO
from tests.management.helpers import on_disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.artifacts.compiler_process import CompileJob
    from emb_model_provider.progress import OnProgress
    from emb_model_provider.settings import Settings
    from emb_model_provider.snapshots.snapshot import Snapshot
    from tests.hubs.servers import ModelScopeServer

DESCRIPTION = ModelDescription(
    dimension=8,
    max_length=128,
    vocab_size=100,
    tokenizer_json="{}",
    pad_token_id=0,
    padding_side="right",
    normalize=True,
    pooling="mean",
    prompts={},
    default_prompt=None,
    excludes_prompt=False,
    matryoshka=None,
    precision="fp32",
    device="cpu",
    backend="openvino",
)


@pytest.fixture
def snapshot(configured: Callable[..., Settings], manager: ModelManager) -> Snapshot:
    """Return a downloaded snapshot."""
    return manager.ensure(resolve_model(configured(), MS_REPO))


def recipe(digest: str, weights: str = "fp32") -> Any:
    """Return as much of a recipe as the store needs."""
    values = {"snapshot": digest, "weights": weights, "compute": ["fp32"], "versions": {}}
    return SimpleNamespace(key=f"{weights}-{digest[:20]}", as_json=lambda: values)


def fill(directory: Path, made_of: Any) -> None:
    """Write the files of an artifact."""
    for name in FILES:
        (directory / name).write_bytes(b"{}" * 100)
    write_manifest(directory, made_of, DESCRIPTION, made_by="a test", probe=np.ones(DESCRIPTION.dimension, np.float32))


def add_artifact(cache: Path, digest: str, weights: str = "fp32") -> str:
    """Add an artifact to the store, and return its key."""
    store = ArtifactStore(cache, max_bytes=1 << 30)
    made_of = recipe(digest, weights)
    with store.making(made_of, CancelToken(), wait_s=60) as directory:
        fill(directory, made_of)
        store.add(made_of, directory)[1].release()
    return str(made_of.key)


def add_fidelity(cache: Path, digest: str) -> Path:
    """Add a record of measured fidelity, and return its path."""
    path = cache / "fidelity" / f"{digest[:8]}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"min_cosine": 1.0, "snapshot": digest}))
    return path


def artifact_keys(cache: Path) -> list[str]:
    """Return the names of everything in the store except locks."""
    return sorted(path.name for path in (cache / "artifacts").iterdir() if path.suffix not in (".lock", ".hold"))


def test_artifacts_are_listed_and_removed_with_their_model(
    configured: Callable[..., Settings], manager: ModelManager, snapshot: Snapshot, tmp_path: Path
) -> None:
    """So are refusals and measured fidelity; those of other models are kept."""
    cache = tmp_path / "cache"
    digest = manager.ensure(resolve_model(configured(), HF_REPO)).digest
    keys = [add_artifact(cache, digest), add_artifact(cache, digest, "int8")]
    other = add_artifact(cache, snapshot.digest)
    ArtifactStore(cache, max_bytes=1).refuse(recipe(digest, "int4"), "not accurate enough")
    own_fidelity, other_fidelity = add_fidelity(cache, digest), add_fidelity(cache, snapshot.digest)
    (model,) = manager.find(HF_REPO)
    assert sorted(artifact.key for artifact in model.artifacts) == sorted(keys)
    assert {artifact.precision for artifact in model.artifacts} == {"fp32", "int8"}
    assert manager.inspect(model).max_tokens == 128
    removal = manager.remove(HF_REPO)
    assert sorted(removal.artifacts) == sorted(keys)
    assert removal.freed == model.size == model.files_size + sum(each.size for each in model.artifacts)
    assert artifact_keys(cache) == [other]
    assert not own_fidelity.exists()
    assert other_fidelity.exists()


def test_artifact_in_use_keeps_its_model(manager: ModelManager, snapshot: Snapshot, tmp_path: Path) -> None:
    """The model is in use, too, and nothing is removed."""
    add_artifact(tmp_path / "cache", snapshot.digest)
    found = ArtifactStore(tmp_path / "cache", max_bytes=1).find(recipe(snapshot.digest))
    assert found is not None
    (model,) = manager.list()
    assert (model.in_use, model.artifacts[0].in_use) == (True, True)
    before = on_disk(tmp_path)
    with pytest.raises(ModelInUseError, match="compiled"):
        manager.remove(MS_REPO)
    assert on_disk(tmp_path) == before
    found[1].release()
    assert len(manager.remove(MS_REPO).artifacts) == 1


def test_artifact_of_a_loaded_model_does_not_keep_another_model(
    configured: Callable[..., Settings], manager: ModelManager, modelscope: ModelScopeServer, tmp_path: Path
) -> None:
    """Two models have the same files, and one of them is loaded. The other is removed, without the shared artifact."""
    modelscope.repos["iic/copy"] = modelscope.repos[MS_REPO]
    loaded, lock = manager.acquire(resolve_model(configured(), MS_REPO))
    manager.ensure(resolve_model(configured(), "iic/copy"))
    key = add_artifact(tmp_path / "cache", loaded.digest)
    held = ArtifactStore(tmp_path / "cache", max_bytes=1).find(recipe(loaded.digest))
    assert held is not None
    assert {model.model_name: model.in_use for model in manager.list()} == {MS_REPO: True, "iic/copy": False}
    assert manager.remove("iic/copy", dry_run=True).artifacts == []
    assert manager.remove("iic/copy").artifacts == []
    assert artifact_keys(tmp_path / "cache") == [key]
    with pytest.raises(ModelInUseError):
        manager.remove(MS_REPO)
    held[1].release()
    lock.release()


def test_artifact_of_two_models_is_removed_with_the_last(
    configured: Callable[..., Settings], manager: ModelManager, tmp_path: Path
) -> None:
    """The same files from a hub and in a directory have one artifact."""
    digest = manager.ensure(resolve_model(configured(), HF_REPO)).digest
    copy = manager.ensure_model_cached(HF_REPO, local_dir=tmp_path / "copy")
    manager.ensure_model_cached(str(copy))
    key = add_artifact(tmp_path / "cache", digest)
    fidelity = add_fidelity(tmp_path / "cache", digest)
    assert [[artifact.key for artifact in model.artifacts] for model in manager.list()] == [[key], [key]]
    assert not manager.remove(HF_REPO).artifacts
    assert fidelity.exists()
    assert [artifact.key for artifact in manager.find(str(copy))[0].artifacts] == [key]
    assert manager.remove(str(copy)).artifacts == [key]
    assert not fidelity.exists()


def test_damaged_artifact_is_found_and_repaired(manager: ModelManager, snapshot: Snapshot, tmp_path: Path) -> None:
    """An artifact with wrong bytes is no longer served, and a repair removes it."""
    key = add_artifact(tmp_path / "cache", snapshot.digest)
    assert manager.verify(manager.list()[0]).ok
    graph = tmp_path / "cache" / "artifacts" / key / GRAPH
    times = graph.stat().st_atime_ns, graph.stat().st_mtime_ns
    graph.write_bytes(b"[]" * 100)
    os.utime(graph, ns=times)
    verification = manager.verify(manager.list()[0])
    assert (verification.ok, verification.damaged_artifacts) == (False, [key])
    assert ArtifactStore(tmp_path / "cache", max_bytes=1 << 30).find(recipe(snapshot.digest)) is None
    repaired, (note,) = manager.repair(verification)
    assert (repaired.ok, repaired.artifacts) == (True, [])
    assert "emb-provider pull" in note


def test_prune_removes_artifacts_without_a_snapshot(manager: ModelManager, snapshot: Snapshot, tmp_path: Path) -> None:
    """So it does with records without a snapshot, and artifacts that were not finished."""
    cache = tmp_path / "cache"
    kept = add_artifact(cache, snapshot.digest)
    orphan = add_artifact(cache, "0" * 64)
    fidelity = add_fidelity(cache, "1" * 64)
    unfinished = cache / "artifacts" / f".{'2' * 64}.abc.tmp"
    unfinished.mkdir()
    (unfinished / "half").write_bytes(b"?" * 1000)
    before = on_disk(tmp_path)
    planned = manager.prune(dry_run=True)
    assert on_disk(tmp_path) == before
    pruned = manager.prune()
    assert planned.artifacts == pruned.artifacts == [orphan]
    assert planned.freed == pruned.freed > 1000
    assert artifact_keys(cache) == [kept]
    assert not fidelity.exists()
    assert [model.model_name for model in manager.list()] == [MS_REPO]


def test_prune_keeps_an_artifact_in_use(manager: ModelManager, tmp_path: Path) -> None:
    """An artifact can be served without a snapshot, from a container image."""
    add_artifact(tmp_path / "cache", "0" * 64)
    found = ArtifactStore(tmp_path / "cache", max_bytes=1).find(recipe("0" * 64))
    assert found is not None
    assert not manager.prune().artifacts
    found[1].release()
    assert len(manager.prune().artifacts) == 1


def test_compile_describes_what_is_served(
    configured: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is downloaded and compiled once. Afterwards it is listed, not in use, and can be removed."""

    def run_compiler(job: CompileJob, on_progress: OnProgress, _: CancelToken, **__: object) -> CompileResult:
        on_progress(Progress("compile", job.snapshot.repository, step="convert"))
        fill(job.directory, job.recipe)
        return CompileResult("done")

    monkeypatch.setattr("emb_model_provider.artifacts.prepare.run_compiler", run_compiler)
    settings = configured(device="cpu")
    manager = ModelManager(settings)
    steps: list[str] = []
    spec = resolve_model(settings, MS_REPO, precision="fp32")
    for _ in range(2):
        compiled = manager.compile(spec, on_progress=lambda progress: steps.append(progress.step))
        assert compiled.backend == "openvino"
        assert compiled.description is not None
        assert compiled.description.dimension == DESCRIPTION.dimension
    assert [step for step in steps if step] == ["convert"]
    (model,) = manager.list()
    assert (model.in_use, model.artifacts[0].in_use) == (False, False)
    assert model.artifacts[0].size == compiled.size
    assert manager.remove(MS_REPO).artifacts == [model.artifacts[0].key]
    assert artifact_keys(tmp_path / "cache") == []
    served = manager.compile(resolve_model(configured(backend="torch"), MS_REPO))
    assert (served.backend, served.description) == ("torch", None)
