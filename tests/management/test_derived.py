"""What derives from a snapshot: artifacts, refusals and figures, which come and go with it."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.artifacts.manifest import FILES, GRAPH, write_manifest
from emb_model_provider.artifacts.store import ArtifactStore
from emb_model_provider.backends.base import ModelDescription
from emb_model_provider.errors import ModelInUseError
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.model_resolver import resolve_model
from tests.hubs.conftest import HF_REPO, MS_REPO
from tests.management.conftest import on_disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.settings import Settings

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


def recipe(digest: str, weights: str = "fp32") -> Any:
    """As much of a recipe as an artifact on the disk shows."""
    values = {"snapshot": digest, "weights": weights, "compute": ["fp32"], "versions": {}}
    return SimpleNamespace(key=f"{weights}-{digest[:20]}", as_json=lambda: values)


def make(cache: Path, digest: str, weights: str = "fp32") -> str:
    """Put an artifact into the store, as the compile step does; return its key."""
    store = ArtifactStore(cache, max_bytes=1 << 30)
    made_of = recipe(digest, weights)
    with store.making(made_of, stopped=lambda: False) as directory:
        for name in FILES:
            (directory / name).write_bytes(b"{}" * 100)
        write_manifest(directory, made_of, DESCRIPTION, made_by="a test")
        store.keep(made_of, directory)[1].release()
    return str(made_of.key)


def figure(cache: Path, digest: str) -> Path:
    path = cache / "fidelity" / f"{digest[:8]}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"min_cosine": 1.0, "snapshot": digest}))
    return path


def test_a_model_takes_what_derives_from_it_along(manager: ModelManager, tmp_path: Path) -> None:
    """Artifacts are listed with their model and go with it, as do refusals and figures; those of others stay."""
    cache = tmp_path / "cache"
    manager.ensure_model_cached(HF_REPO)
    manager.ensure_model_cached(MS_REPO)
    digests = {entry.name: entry.digest for entry in manager.list()}
    keys = [make(cache, digests[HF_REPO]), make(cache, digests[HF_REPO], "int8")]
    other = make(cache, digests[MS_REPO])
    ArtifactStore(cache, max_bytes=1).refuse(recipe(digests[HF_REPO], "int4"), "it cannot be")
    mine, theirs = figure(cache, digests[HF_REPO]), figure(cache, digests[MS_REPO])
    (entry,) = manager.find(HF_REPO)
    assert sorted(artifact.key for artifact in entry.artifacts) == sorted(keys)
    assert {artifact.precision for artifact in entry.artifacts} == {"fp32", "int8"}
    assert manager.inspect(entry)["max_tokens"] == 128
    removal = manager.remove(HF_REPO)
    assert sorted(removal.artifacts) == sorted(keys)
    assert removal.freed == entry.size + sum(artifact.size for artifact in entry.artifacts)
    assert [path.name for path in (cache / "artifacts").iterdir()] == [other]
    assert not mine.exists()
    assert theirs.exists()
    manager.remove(MS_REPO)
    assert not list(cache.iterdir())


def test_an_artifact_in_use_keeps_its_model(manager: ModelManager, tmp_path: Path) -> None:
    """While a process serves from an artifact its snapshot is in use, too, and neither is removed."""
    manager.ensure_model_cached(MS_REPO)
    digest = manager.list()[0].digest
    assert digest is not None
    make(tmp_path / "cache", digest)
    found = ArtifactStore(tmp_path / "cache", max_bytes=1).find(recipe(digest))
    assert found is not None
    assert manager.list()[0].artifacts[0].in_use
    before = on_disk(tmp_path)
    with pytest.raises(ModelInUseError, match="compiled"):
        manager.remove(MS_REPO)
    assert on_disk(tmp_path) == before
    found[1].release()
    assert len(manager.remove(MS_REPO).artifacts) == 1


def test_an_artifact_of_two_models_stays_with_the_other(manager: ModelManager, tmp_path: Path) -> None:
    """The same files from a hub and in a directory have one artifact, which goes with the last of them."""
    manager.ensure_model_cached(HF_REPO)
    copy = manager.ensure_model_cached(HF_REPO, local_dir=tmp_path / "copy")
    manager.ensure_model_cached(str(copy))
    first, second = manager.list()
    assert first.digest == second.digest
    assert first.digest is not None
    key = make(tmp_path / "cache", first.digest)
    note = figure(tmp_path / "cache", first.digest)
    assert not manager.remove(HF_REPO).artifacts
    assert note.exists()
    assert [artifact.key for artifact in manager.find(str(copy))[0].artifacts] == [key]
    assert manager.remove(str(copy)).artifacts == [key]
    assert not note.exists()


def test_a_damaged_artifact_is_found_and_not_served_from(manager: ModelManager, tmp_path: Path) -> None:
    """Verification reads artifacts, too; one with other bytes is told by its key, and made again when needed."""
    manager.ensure_model_cached(MS_REPO)
    digest = manager.list()[0].digest
    assert digest is not None
    key = make(tmp_path / "cache", digest)
    assert manager.verify(manager.list()[0]).ok
    graph = tmp_path / "cache" / "artifacts" / key / GRAPH
    times = graph.stat().st_atime_ns, graph.stat().st_mtime_ns
    graph.write_bytes(b"[]" * 100)
    os.utime(graph, ns=times)
    store = ArtifactStore(tmp_path / "cache", max_bytes=1 << 30)
    assert manager.verify(manager.list()[0]).damaged_artifacts == (key,)
    assert store.find(recipe(digest)) is None


def test_prune_removes_what_nobody_can_use(manager: ModelManager, tmp_path: Path) -> None:
    """Artifacts and notes whose snapshot is gone, and half-made ones that nobody makes, go; the rest stays."""
    cache = tmp_path / "cache"
    manager.ensure_model_cached(MS_REPO)
    digest = manager.list()[0].digest
    assert digest is not None
    kept = make(cache, digest)
    gone = make(cache, "0" * 64)
    note = figure(cache, "1" * 64)
    left = cache / "artifacts" / f".{'2' * 64}.abc.tmp"
    left.mkdir()
    (left / "half").write_bytes(b"?" * 1000)
    (cache / "artifacts" / "stale.lock").touch()
    before = on_disk(tmp_path)
    would = manager.prune(dry_run=True)
    assert on_disk(tmp_path) == before
    did = manager.prune()
    assert list(would.artifacts) == list(did.artifacts) == [gone]
    assert would.freed == did.freed > 1000
    assert [path.name for path in (cache / "artifacts").iterdir()] == [kept]
    assert not note.exists()
    assert [entry.name for entry in manager.list()] == [MS_REPO]


def test_an_artifact_that_is_served_from_outlives_a_prune(manager: ModelManager, tmp_path: Path) -> None:
    """Its snapshot may be gone, as in an image that was baked without one."""
    make(tmp_path / "cache", "0" * 64)
    found = ArtifactStore(tmp_path / "cache", max_bytes=1).find(recipe("0" * 64))
    assert found is not None
    assert not manager.prune().artifacts
    found[1].release()
    assert len(manager.prune().artifacts) == 1


def test_a_compiled_model_is_described_and_held_no_longer(
    configured: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compile() fetches, compiles once and describes what serves; afterwards it is listed, and can be removed."""
    source = tmp_path / "elsewhere" / "artifacts" / make(tmp_path / "elsewhere", "0" * 64)
    told = {"log": str(tmp_path / "log"), "copy": str(source)}
    monkeypatch.setenv("FAKE_CHILD", json.dumps(told))
    monkeypatch.setattr(
        "emb_model_provider.artifacts.compiler_process.COMMAND",
        (sys.executable, "-m", "tests.compile.fake_child"),
    )
    settings = configured(device="cpu")
    manager = ModelManager(settings)
    compiling: list[int] = []
    spec = resolve_model(settings, MS_REPO, precision="fp32")
    for _ in range(2):
        compiled = manager.compile(spec, on_compiling=lambda: compiling.append(1))
        assert compiled.backend == "openvino"
        assert compiled.description is not None
        assert compiled.description.dimension == DESCRIPTION.dimension
    assert compiling == [1]
    (entry,) = manager.list()
    assert (entry.in_use, entry.artifacts[0].in_use) == (False, False)
    assert entry.artifacts[0].size == compiled.size
    assert manager.remove(MS_REPO).artifacts == [entry.artifacts[0].key]
    assert not list((tmp_path / "cache").iterdir())
    served = manager.compile(resolve_model(configured(backend="torch"), MS_REPO))
    assert (served.backend, served.description) == ("torch", None)
