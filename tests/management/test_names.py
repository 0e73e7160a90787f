"""What a name means: of the models on disk, and to a manager that was made for one hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import AmbiguousNameError, NotCachedError
from emb_model_provider.management.manager import ModelManager, get_model_manager
from emb_model_provider.model_resolver import resolve_model
from tests.hubs.conftest import HF_REPO, MS_REPO, model_files
from tests.hubs.test_existing_caches import write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.settings import Settings
    from tests.hubs.servers import HuggingFaceServer


def test_an_id_of_two_models_removes_neither(manager: ModelManager, huggingface: HuggingFaceServer) -> None:
    """`a_b_c` can be a/b_c and a_b/c: both stay, and are named; a name never means another one with the same id."""
    for name in ("a/b_c", "a_b/c"):
        huggingface.repos[name] = model_files()
        manager.ensure_model_cached(name)
    with pytest.raises(AmbiguousNameError, match="a/b_c, a_b/c"):
        manager.remove("a_b_c")
    assert len(manager.list()) == 2
    manager.remove("a/b_c")
    with pytest.raises(NotCachedError):
        manager.remove("a/b_c")
    assert [entry.name for entry in manager.find("a_b_c")] == ["a_b/c"]


def test_an_alias_means_its_own_revision(
    configured: Callable[..., Settings], huggingface: HuggingFaceServer
) -> None:
    """Of two aliases that pin two revisions of a repository, removing the one leaves the other's model."""
    huggingface.revisions = ("main", "v1")
    pinned = {"old": {"name": HF_REPO, "revision": "v1"}, "new": {"name": HF_REPO, "revision": "main"}}
    manager = ModelManager(configured(model_mapping=pinned))
    manager.ensure_model_cached("old")
    huggingface.repos[HF_REPO]["config.json"] = b'{"model_type": "bert"}'
    kept = manager.ensure_model_cached("new")
    manager.remove("old")
    assert [entry.path for entry in manager.list()] == [kept]
    with pytest.raises(NotCachedError):
        manager.remove("old")


def test_the_settings_word_on_a_model_wins_over_the_managers_hub(
    configured: Callable[..., Settings], tmp_path: Path
) -> None:
    """A manager for ModelScope fetches and evicts a model whose entry names Hugging Face, and a directory, too."""
    write(tmp_path / "mine", model_files())
    settings = configured(
        model_mapping={
            "theirs": {"name": HF_REPO, "source": "huggingface"},
            "open": {"name": MS_REPO, "pooling": "cls"},
            "here": {"name": "here", "path": tmp_path / "mine"},
        }
    )
    manager = get_model_manager(use_modelscope=True, settings=settings)
    assert "hf" in manager.ensure_model_cached("theirs").parts
    assert "ms" in manager.ensure_model_cached("open").parts
    for name in ("here", str(tmp_path / "mine")):
        assert manager.ensure_model_cached(name) == tmp_path / "mine"
    for name in ("theirs", "open", str(tmp_path / "mine")):
        manager.evict_model(name)
    assert not manager.list()


def test_what_the_settings_say_of_a_model_holds_where_its_own_hub_is_named(
    configured: Callable[..., Settings], tmp_path: Path
) -> None:
    """Naming the hub that `auto` is, or another revision of an alias, loses nothing; at another hub it is that name."""
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
