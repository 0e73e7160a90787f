"""ModelScopeHub, with the real client and a local server."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import (
    AccessDeniedError,
    CacheNotWritableError,
    CorruptSnapshotError,
    HubError,
    HubUnavailableError,
    IncompleteRepositoryError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from emb_model_provider.hubs.fetch import fetch_snapshot
from tests.hubs.conftest import MS_REPO, WEIGHTS, spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.progress import Progress
    from emb_model_provider.settings import HubSettings
    from tests.hubs.servers import ModelScopeServer


def test_download_of_the_files_that_serving_needs(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """A repository that only has pytorch_model.bin is served, with its configuration.json."""
    snapshot = fetch_snapshot(spec(MS_REPO), settings())
    assert (snapshot.hub, snapshot.revision) == ("modelscope", "master")
    assert [file.path for file in snapshot.files] == [
        "README.md",
        "config.json",
        "configuration.json",
        "pytorch_model.bin",
        "vocab.txt",
    ]
    assert snapshot.files[3].sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert (snapshot.path / "pytorch_model.bin").read_bytes() == WEIGHTS
    assert "resources/dual-encoder.png" not in modelscope.bodies()


def test_requests_of_a_download(settings: Callable[..., HubSettings], modelscope: ModelScopeServer) -> None:
    """The revisions and the listing are requested once, and so is each file."""
    fetch_snapshot(spec(MS_REPO), settings())
    asked = [request.path.removeprefix(f"/api/v1/models/{MS_REPO}") for request in modelscope.requests]
    assert asked.count("/revisions") == 1
    assert asked.count("/repo/files") == 1
    assert asked.count("/repo") == 5
    assert set(modelscope.bodies().values()) == {1}


def test_token_gives_access_to_a_private_repository(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """It is sent as a header and a cookie, but not to the storage host."""
    modelscope.token = "ms_right"
    with pytest.raises(AccessDeniedError, match="EMB_PROVIDER_MODELSCOPE_TOKEN"):
        fetch_snapshot(spec(MS_REPO), settings())
    fetch_snapshot(spec(MS_REPO), settings(modelscope_token="ms_right"))
    stored = [request for request in modelscope.requests if request.storage]
    assert len(stored) == 1
    assert "authorization" not in stored[0].headers


def test_dropped_connection_is_resumed(settings: Callable[..., HubSettings], modelscope: ModelScopeServer) -> None:
    modelscope.faults.drop_after["pytorch_model.bin"] = [70_000]
    snapshot = fetch_snapshot(spec(MS_REPO), settings())
    assert (snapshot.path / "pytorch_model.bin").read_bytes() == WEIGHTS
    ranges = [request.headers.get("range") for request in modelscope.requests if request.storage]
    assert ranges == [None, "bytes=70000-"]


def test_progress_ends_at_the_size_of_all_files(settings: Callable[..., HubSettings]) -> None:
    seen: list[Progress] = []
    snapshot = fetch_snapshot(spec(MS_REPO), settings(), seen.append)
    total = sum(file.size for file in snapshot.files)
    downloads = [progress.done_bytes for progress in seen if progress.phase == "download"]
    assert (downloads[0], downloads[-1]) == (0, total)
    assert seen[-1].phase == "verify"
    assert seen[-1].done_bytes == seen[-1].total_bytes == total


def test_client_draws_no_progress_bars(settings: Callable[..., HubSettings], capfd: pytest.CaptureFixture[str]) -> None:
    fetch_snapshot(spec(MS_REPO), settings())
    assert capfd.readouterr() == ("", "")


def test_wrong_bytes_are_downloaded_again(settings: Callable[..., HubSettings], modelscope: ModelScopeServer) -> None:
    modelscope.faults.wrong_bytes["pytorch_model.bin"] = 1
    snapshot = fetch_snapshot(spec(MS_REPO), settings())
    assert (snapshot.path / "pytorch_model.bin").read_bytes() == WEIGHTS
    assert modelscope.bodies()["pytorch_model.bin"] == 2


def test_bytes_that_are_always_wrong_are_an_error(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """The file is removed, and there is no manifest."""
    config = settings()
    modelscope.faults.wrong_bytes["pytorch_model.bin"] = 99
    with pytest.raises(CorruptSnapshotError, match="other bytes"):
        fetch_snapshot(spec(MS_REPO), config)
    assert not list(config.modelscope_cache_dir.rglob("pytorch_model.bin"))
    assert not list(config.cache_dir.rglob("*.json"))


def test_error_of_an_unknown_revision_names_existing_ones(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """The hub itself returns an empty listing. No directory is created."""
    config = settings()
    modelscope.revisions = ("master", "v1.0")
    with pytest.raises(RevisionNotFoundError, match=r"'main'; it has master, v1\.0\..*called master"):
        fetch_snapshot(spec(MS_REPO, revision="main"), config)
    assert not (config.modelscope_cache_dir / "models").exists()


def test_unknown_commit_is_an_error(settings: Callable[..., HubSettings]) -> None:
    """A commit is not in the list of revisions, so it is valid only if it has files."""
    with pytest.raises(RevisionNotFoundError, match="no commit 0123456789abcdef"):
        fetch_snapshot(spec(MS_REPO, revision="0123456789abcdef"), settings())


def test_download_of_a_tag(settings: Callable[..., HubSettings], modelscope: ModelScopeServer) -> None:
    modelscope.revisions = ("master", "v1.0")
    snapshot = fetch_snapshot(spec(MS_REPO, revision="v1.0"), settings())
    assert snapshot.revision == "v1.0"
    assert {request.query.get("Revision") for request in modelscope.requests if request.query} == {"v1.0"}


def test_default_branch_can_be_main(settings: Callable[..., HubSettings], modelscope: ModelScopeServer) -> None:
    modelscope.revisions = ("main",)
    assert fetch_snapshot(spec(MS_REPO), settings()).revision == "main"


def test_empty_repository_is_rejected(settings: Callable[..., HubSettings], modelscope: ModelScopeServer) -> None:
    modelscope.repos[MS_REPO].clear()
    with pytest.raises(IncompleteRepositoryError, match="is empty"):
        fetch_snapshot(spec(MS_REPO), settings())


def test_repository_without_weights_is_rejected(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """Nothing is downloaded. An export to ONNX does replace them."""
    weights = modelscope.repos[MS_REPO].pop("pytorch_model.bin")
    with pytest.raises(IncompleteRepositoryError, match="no weights"):
        fetch_snapshot(spec(MS_REPO), settings())
    assert not modelscope.bodies()
    modelscope.repos[MS_REPO] |= {"onnx/model.onnx": weights, "onnx/model_int8.onnx": weights}
    fetch_snapshot(spec(MS_REPO), settings())
    assert modelscope.bodies()["onnx/model.onnx"] == 1
    assert not modelscope.bodies()["onnx/model_int8.onnx"]


def test_missing_repository(settings: Callable[..., HubSettings]) -> None:
    """No directory is created."""
    config = settings()
    with pytest.raises(RepositoryNotFoundError, match="no repository iic/nothing"):
        fetch_snapshot(spec("iic/nothing"), config)
    assert not (config.modelscope_cache_dir / "models").exists()


@pytest.mark.parametrize("status", [401, 403])
def test_denied_access_names_the_setting_but_not_the_token(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, status: int
) -> None:
    modelscope.faults.status = status
    with pytest.raises(AccessDeniedError, match="EMB_PROVIDER_MODELSCOPE_TOKEN") as caught:
        fetch_snapshot(spec(MS_REPO), settings(modelscope_token="ms_secret"))
    assert "ms_secret" not in str(caught.value)


def test_rejected_token_of_the_client_itself(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms_secret")
    modelscope.faults.status = 403
    with pytest.raises(AccessDeniedError, match="the token was rejected"):
        fetch_snapshot(spec(MS_REPO), settings())


def test_http_503_is_an_unavailable_hub(settings: Callable[..., HubSettings], modelscope: ModelScopeServer) -> None:
    modelscope.faults.status = 503
    with pytest.raises(HubUnavailableError, match="EMB_PROVIDER_MODELSCOPE_ENDPOINT") as caught:
        fetch_snapshot(spec(MS_REPO), settings())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../../escape.json", "/etc/escape", "a/../../b.json"])
def test_path_outside_the_directory_is_rejected(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, name: str
) -> None:
    """The client would write such a file. Nothing is downloaded."""
    modelscope.faults.listed_too = [name]
    with pytest.raises(CorruptSnapshotError, match="outside its directory"):
        fetch_snapshot(spec(MS_REPO), settings())
    assert not modelscope.bodies()


def test_full_disk_is_an_error_with_its_directory(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    config = settings()
    directory = config.modelscope_cache_dir / "models" / MS_REPO.replace("/", "--") / "snapshots" / "master"
    directory.mkdir(parents=True)
    # The client writes to this name first; /dev/full accepts the file and refuses its bytes.
    (directory / "pytorch_model.bin.incomplete").symlink_to("/dev/full")
    with pytest.raises(HubError, match=r"No space left in .*EMB_PROVIDER_MODELSCOPE_CACHE_DIR") as caught:
        fetch_snapshot(spec(MS_REPO), config)
    assert not isinstance(caught.value, CacheNotWritableError)


def test_cached_files_are_not_downloaded_again(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, tmp_path: Path
) -> None:
    """Without a manifest they are checked against the listing."""
    fetch_snapshot(spec(MS_REPO), settings())
    modelscope.forget()
    fetch_snapshot(spec(MS_REPO), settings(cache_dir=tmp_path / "other"))
    assert not modelscope.bodies()
