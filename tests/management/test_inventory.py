"""The list of models on disk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import NotCachedError
from emb_model_provider.snapshots import manifest
from tests.hubs.conftest import HF_REPO, MS_REPO, modelscope_files
from tests.hubs.helpers import write_files
from tests.management.helpers import on_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Any

    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.settings import Settings
    from tests.hubs.servers import HuggingFaceServer


def test_list_describes_models(manager: ModelManager, huggingface: HuggingFaceServer) -> None:
    path = manager.ensure_model_cached(HF_REPO)
    (model,) = manager.list()
    assert (model.model_name, model.id, model.source) == (HF_REPO, "acme_tiny", "huggingface")
    assert (model.path, model.revision, model.asked_revision) == (str(path), huggingface.commit(HF_REPO), None)
    assert model.size == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert (model.state, model.in_use, model.artifacts) == ("complete", False, [])
    assert model.fetched is not None
    assert model.last_used is not None
    (values,) = manager.list_cached_models()
    assert (values["model_name"], values["size"], values["path"]) == (HF_REPO, model.size, str(path))


def test_use_of_a_cached_model_is_recorded(
    configured: Callable[..., Settings], manager: ModelManager, huggingface: HuggingFaceServer
) -> None:
    """`last_used` changes without a request to the hub, `fetched` does not."""
    manager.ensure_model_cached(HF_REPO)
    (first,) = manager.list()
    os.utime(next(configured().hubs.cache_dir.rglob("*.json")), (1, 1))
    huggingface.forget()
    manager.ensure_model_cached(HF_REPO)
    (second,) = manager.list()
    assert not huggingface.requests
    assert second.fetched == first.fetched
    assert second.last_used is not None
    assert second.last_used.timestamp() > 1


def test_requests_that_lead_to_one_directory_are_one_model(
    manager: ModelManager, huggingface: HuggingFaceServer, empty: dict[str, tuple[str, int]], tmp_path: Path
) -> None:
    """A branch, its commit and a part of its files are listed once, found by each revision, and removed together."""
    commit = huggingface.commit(HF_REPO)
    manager.ensure_model_cached(HF_REPO, include=["*.json"])
    manager.ensure_model_cached(HF_REPO, revision=commit)
    manager.ensure_model_cached(HF_REPO)
    (model,) = manager.list()
    assert model.asked_revision is None
    for revision in (commit, commit[:8]):
        assert manager.find(HF_REPO, revision=revision) == [model]
    manager.remove(HF_REPO, revision=commit)
    assert on_disk(tmp_path) == empty


def test_models_of_other_programs_are_listed_on_request_and_not_removed(manager: ModelManager, tmp_path: Path) -> None:
    directory = tmp_path / "ms" / "hub" / "models" / "iic" / "other-v1___5"
    write_files(directory, modelscope_files())
    manager.ensure_model_cached(MS_REPO)
    assert [model.model_name for model in manager.list()] == [MS_REPO]
    other = next(model for model in manager.list(everything=True) if model.model_name != MS_REPO)
    assert (other.model_name, other.state, other.path) == ("iic/other-v1.5", "unverified", str(directory))
    assert not manager.verify(other).ok
    with pytest.raises(NotCachedError, match="another program downloaded it"):
        manager.remove("iic/other-v1.5")
    before = on_disk(directory)
    manager.remove_all()
    manager.prune()
    assert on_disk(directory) == before


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that gets an entry whenever all manifests are read."""
    reads: list[Path] = []
    load_all = manifest.load_all

    def spy(manifest_dir: Path) -> Iterator[Any]:
        reads.append(manifest_dir)
        return load_all(manifest_dir)

    monkeypatch.setattr(manifest, "load_all", spy)
    return reads


def test_number_of_scans(manager: ModelManager, scans: list[Path]) -> None:
    """A removal scans before and after it takes its locks; other operations scan once."""
    for repository in (HF_REPO, MS_REPO):
        manager.ensure_model_cached(repository)
    (model, _) = manager.list()
    counts = {}
    for name, operation in (
        ("list", manager.list),
        ("find", lambda: manager.find(HF_REPO)),
        ("inspect", lambda: manager.inspect(model)),
        ("dry run", lambda: manager.remove(HF_REPO, dry_run=True)),
        ("remove", lambda: manager.remove(HF_REPO)),
    ):
        scans.clear()
        operation()
        counts[name] = len(scans)
    assert counts == {"list": 1, "find": 1, "inspect": 1, "dry run": 1, "remove": 2}
