"""Names that differ between hubs, and patterns of files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import HubError, IncompleteRepositoryError
from emb_model_provider.hubs.fetch import fetch_snapshot
from tests.hubs.conftest import HF_REPO, MS_REPO, model_files, spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.settings import HubSettings
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer

NAMES = {"acme/model": {"modelscope": MS_REPO, "huggingface": HF_REPO}}


@pytest.mark.parametrize(("source", "repo"), [("modelscope", MS_REPO), ("huggingface", HF_REPO)])
def test_a_model_is_asked_for_by_the_name_its_hub_has(
    settings: Callable[..., HubSettings], source: str, repo: str
) -> None:
    """Each hub is asked under its own name, and a snapshot says what that was; the name it is served by is another."""
    snapshot = fetch_snapshot(spec("acme/model", source=source), settings(names=NAMES))
    assert (snapshot.hub, snapshot.repository) == (source, repo)
    assert fetch_snapshot(spec(repo, source=source), settings()) == snapshot


def test_the_fallback_asks_under_the_other_hubs_name(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """Where ModelScope has no such repository, Hugging Face is asked for what it calls the model."""
    modelscope.repos.clear()
    config = settings(names=NAMES, modelscope_fallback_to_huggingface=True)
    snapshot = fetch_snapshot(spec("acme/model", source="modelscope"), config)
    assert (snapshot.hub, snapshot.repository) == ("huggingface", HF_REPO)


def test_a_mapped_name_is_checked_as_a_typed_one_is(settings: Callable[..., HubSettings]) -> None:
    """A name in the settings that would lead out of the cache is refused before anybody is asked."""
    with pytest.raises(HubError, match="neither a directory here nor a repository"):
        fetch_snapshot(
            spec("acme/model", source="huggingface"),
            settings(names={"acme/model": {"huggingface": "../../etc"}}),
        )


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_patterns_choose_files_and_have_a_manifest_of_their_own(
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    repo: str,
) -> None:
    """Only what matches is fetched; the whole model is fetched afterwards all the same, and each is known by itself."""
    config = settings()
    part = fetch_snapshot(spec(repo), config, include=["*.json"], exclude=["1_Pooling/*"])
    names = {file.path for file in part.files}
    assert "config.json" in names
    assert all(name.endswith(".json") and "/" not in name for name in names)
    whole = fetch_snapshot(spec(repo), config)
    assert names < {file.path for file in whole.files}
    huggingface.forget()
    modelscope.forget()
    assert fetch_snapshot(spec(repo), config, include=["*.json"], exclude=["1_Pooling/*"]) == part
    assert fetch_snapshot(spec(repo), config) == whole
    assert not huggingface.requests + modelscope.requests


def test_patterns_that_leave_nothing_are_an_error_that_names_them(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """Also where they match only what serving never needs."""
    assert "onnx/model.onnx" in model_files()
    with pytest.raises(IncompleteRepositoryError, match=r"include: \*\.onnx"):
        fetch_snapshot(spec(HF_REPO), settings(), include=["*.onnx"])
    assert not huggingface.bodies()
