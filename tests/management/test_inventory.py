"""The list of models on disk, and the models that a name refers to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import AmbiguousNameError, NotCachedError
from emb_model_provider.management.manager import ModelManager, get_model_manager
from emb_model_provider.model_resolver import resolve_model
from emb_model_provider.snapshots import manifest
from tests.hubs.conftest import HF_REPO, MS_REPO, model_files, modelscope_files
from tests.hubs.helpers import write_files
from tests.management.helpers import on_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Any

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


@pytest.mark.parametrize(
    "name", [HF_REPO, "acme_tiny", "model", "acme/model"], ids=["repository", "id", "alias", "mapped"]
)
def test_model_is_found_by_each_of_its_names(configured: Callable[..., Settings], name: str) -> None:
    settings = configured(
        model_mapping={"model": {"name": HF_REPO}}, hub_names={"acme/model": {"huggingface": HF_REPO}}
    )
    manager = ModelManager(settings)
    manager.ensure_model_cached("acme/model")
    (model,) = manager.find(name)
    assert model.model_name == HF_REPO


def test_error_of_an_unknown_name_names_similar_models(manager: ModelManager) -> None:
    """The last part of a name is enough if only one model has it."""
    with pytest.raises(NotCachedError, match="no other model is"):
        manager.find("acme/tyni")
    manager.ensure_model_cached(HF_REPO)
    assert manager.find("tiny")[0].model_name == HF_REPO
    manager.ensure_model_cached(MS_REPO)
    with pytest.raises(NotCachedError, match=r"acme/tiny.*emb-provider pull acme/tyni"):
        manager.find("acme/tyni")
    for wrong in ({"source": "modelscope"}, {"revision": "v9"}):
        with pytest.raises(NotCachedError):
            manager.find(HF_REPO, **wrong)
    with pytest.raises(NotCachedError):
        manager.find("tiny")


def test_ambiguous_id_removes_nothing(manager: ModelManager, huggingface: HuggingFaceServer) -> None:
    """`a_b_c` can be a/b_c and a_b/c. A full name never refers to another model with the same id."""
    for name in ("a/b_c", "a_b/c"):
        huggingface.repos[name] = model_files()
        manager.ensure_model_cached(name)
    with pytest.raises(AmbiguousNameError, match="a/b_c, a_b/c"):
        manager.remove("a_b_c")
    assert len(manager.list()) == 2
    manager.remove("a/b_c")
    with pytest.raises(NotCachedError):
        manager.remove("a/b_c")
    assert [model.model_name for model in manager.find("a_b_c")] == ["a_b/c"]


def test_alias_refers_to_its_revision(configured: Callable[..., Settings], huggingface: HuggingFaceServer) -> None:
    """Two aliases pin two revisions of a repository: removing one keeps the other's model."""
    huggingface.revisions = ("main", "v1")
    pinned = {"old": {"name": HF_REPO, "revision": "v1"}, "new": {"name": HF_REPO, "revision": "main"}}
    manager = ModelManager(configured(model_mapping=pinned))
    manager.ensure_model_cached("old")
    huggingface.repos[HF_REPO]["config.json"] = b'{"model_type": "bert"}'
    kept = manager.ensure_model_cached("new")
    manager.remove("old")
    assert [model.path for model in manager.list()] == [str(kept)]
    with pytest.raises(NotCachedError):
        manager.remove("old")


def test_settings_of_a_model_take_precedence_over_the_hub_of_the_manager(
    configured: Callable[..., Settings], tmp_path: Path
) -> None:
    """A manager for ModelScope downloads a model whose entry names Hugging Face from there, and serves directories."""
    write_files(tmp_path / "mine", model_files())
    settings = configured(
        model_mapping={
            "elsewhere": {"name": HF_REPO, "source": "huggingface"},
            "open": {"name": MS_REPO, "pooling": "cls"},
            "here": {"name": "here", "path": tmp_path / "mine"},
        }
    )
    manager = get_model_manager(use_modelscope=True, settings=settings)
    assert "hf" in manager.ensure_model_cached("elsewhere").parts
    assert "ms" in manager.ensure_model_cached("open").parts
    for name in ("here", str(tmp_path / "mine")):
        assert manager.ensure_model_cached(name) == tmp_path / "mine"
    for name in ("elsewhere", "open", str(tmp_path / "mine")):
        manager.evict_model(name)
    assert not manager.list()


def test_settings_of_a_model_apply_at_its_own_hub(configured: Callable[..., Settings], tmp_path: Path) -> None:
    """Also if the hub that `auto` chooses is named, or another revision; at another hub only the name applies."""
    entry = {"name": MS_REPO, "pooling": "cls", "token": "ms_secret", "cache_dir": tmp_path / "own"}
    settings = configured(model_mapping={"small": entry})
    for name, options in (
        (MS_REPO, {"source": "modelscope"}),
        ("small", {"source": "modelscope"}),
        ("small", {"revision": "v1"}),
    ):
        spec = resolve_model(settings, name, **options)  # type: ignore[arg-type]
        assert (spec.name, spec.pooling, spec.cache_dir) == (MS_REPO, "cls", tmp_path / "own")
        assert spec.revision == options.get("revision")
    elsewhere = resolve_model(settings, "small", source="huggingface")
    assert (elsewhere.name, elsewhere.source, elsewhere.token) == (MS_REPO, "huggingface", None)
