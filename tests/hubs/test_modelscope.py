"""ModelScope: its real client against a server of ours."""

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

    from emb_model_provider.hubs.base import Progress
    from emb_model_provider.settings import HubSettings
    from tests.hubs.servers import ModelScopeServer


def test_fetches_and_hashes_torch_weights_and_configuration(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """A repository that has only pytorch_model.bin is served, with its configuration.json."""
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


def test_only_what_the_protocol_names_is_requested(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """A fetch asks for the revisions, the listing once, and each file once."""
    fetch_snapshot(spec(MS_REPO), settings())
    asked = [request.path.removeprefix(f"/api/v1/models/{MS_REPO}") for request in modelscope.requests]
    assert asked.count("/revisions") == 1
    assert asked.count("/repo/files") == 1
    assert asked.count("/repo") == 5
    assert set(modelscope.bodies().values()) == {1}


def test_the_token_is_sent_as_bearer_and_cookie(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """A private repository opens with the token; the host of large files gets no Authorization."""
    modelscope.token = "ms_right"
    with pytest.raises(AccessDeniedError, match="EMB_PROVIDER_MODELSCOPE_TOKEN"):
        fetch_snapshot(spec(MS_REPO), settings())
    fetch_snapshot(spec(MS_REPO), settings(modelscope_token="ms_right"))
    stored = [request for request in modelscope.requests if request.storage]
    assert len(stored) == 1
    assert "authorization" not in stored[0].headers


def test_a_dropped_connection_is_resumed_with_a_range(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """A transfer that breaks off goes on from the byte where it was."""
    modelscope.faults.drop_after["pytorch_model.bin"] = [70_000]
    snapshot = fetch_snapshot(spec(MS_REPO), settings())
    assert (snapshot.path / "pytorch_model.bin").read_bytes() == WEIGHTS
    ranges = [request.headers.get("range") for request in modelscope.requests if request.storage]
    assert ranges == [None, "bytes=70000-"]


def test_progress_counts_all_files_as_one_total(settings: Callable[..., HubSettings]) -> None:
    """Download and verification end at the total of all files, in bytes."""
    seen: list[Progress] = []
    snapshot = fetch_snapshot(spec(MS_REPO), settings(), seen.append)
    total = sum(file.size for file in snapshot.files)
    downloads = [progress.done_bytes for progress in seen if progress.phase == "download"]
    assert (downloads[0], downloads[-1]) == (0, total)
    assert seen[-1].phase == "verify"
    assert seen[-1].done_bytes == seen[-1].total_bytes == total


def test_nothing_is_drawn_by_the_client(
    settings: Callable[..., HubSettings], capfd: pytest.CaptureFixture[str]
) -> None:
    """The client's own bars and log lines do not reach the terminal."""
    fetch_snapshot(spec(MS_REPO), settings())
    assert capfd.readouterr() == ("", "")


def test_wrong_bytes_are_fetched_again(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """Wrong bytes of the right size are noticed and replaced."""
    modelscope.faults.wrong_bytes["pytorch_model.bin"] = 1
    snapshot = fetch_snapshot(spec(MS_REPO), settings())
    assert (snapshot.path / "pytorch_model.bin").read_bytes() == WEIGHTS
    assert modelscope.bodies()["pytorch_model.bin"] == 2


def test_bytes_that_stay_wrong_are_refused(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """When every try gives wrong bytes there is an error, no such file, and no manifest."""
    config = settings()
    modelscope.faults.wrong_bytes["pytorch_model.bin"] = 99
    with pytest.raises(CorruptSnapshotError, match="other bytes"):
        fetch_snapshot(spec(MS_REPO), config)
    assert not list(config.modelscope_cache_dir.rglob("pytorch_model.bin"))
    assert not list(config.cache_dir.rglob("*.json"))


def test_an_unknown_revision_is_named_though_the_hub_answers_with_an_empty_list(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """`main` where there is only `master` gives an error that says so, and no empty directory."""
    config = settings()
    modelscope.revisions = ("master", "v1.0")
    with pytest.raises(RevisionNotFoundError, match=r"'main'; it has master, v1\.0\..*called master"):
        fetch_snapshot(spec(MS_REPO, revision="main"), config)
    assert not (config.modelscope_cache_dir / "models").exists()


def test_an_unknown_commit_is_not_an_empty_snapshot(settings: Callable[..., HubSettings]) -> None:
    """A commit, which no list of branches names, is believed only if it has files."""
    with pytest.raises(RevisionNotFoundError, match="no commit 0123456789abcdef"):
        fetch_snapshot(spec(MS_REPO, revision="0123456789abcdef"), settings())


def test_a_tag_is_fetched_into_its_own_directory(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """The revision that is asked for is the one that is requested and reported."""
    modelscope.revisions = ("master", "v1.0")
    snapshot = fetch_snapshot(spec(MS_REPO, revision="v1.0"), settings())
    assert snapshot.revision == "v1.0"
    assert {request.query.get("Revision") for request in modelscope.requests if request.query} == {"v1.0"}


def test_a_default_branch_that_is_called_main_is_found(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """A repository without `master` is fetched at `main` where no revision was asked for."""
    modelscope.revisions = ("main",)
    assert fetch_snapshot(spec(MS_REPO), settings()).revision == "main"


def test_an_empty_repository_is_refused(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """An empty listing of a branch that exists is not a model."""
    modelscope.repos[MS_REPO].clear()
    with pytest.raises(IncompleteRepositoryError, match="is empty"):
        fetch_snapshot(spec(MS_REPO), settings())


def test_a_repository_without_weights_is_refused(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """Without weights nothing is fetched, and an export does not take their place."""
    weights = modelscope.repos[MS_REPO].pop("pytorch_model.bin")
    with pytest.raises(IncompleteRepositoryError, match="no weights"):
        fetch_snapshot(spec(MS_REPO), settings())
    modelscope.repos[MS_REPO]["onnx/model.onnx"] = weights
    with pytest.raises(IncompleteRepositoryError, match="only an export"):
        fetch_snapshot(spec(MS_REPO), settings())
    assert not modelscope.bodies()


def test_a_missing_repository_is_said_to_be_missing(settings: Callable[..., HubSettings]) -> None:
    """A repository that does not exist gives its own error, and leaves no directory behind."""
    config = settings()
    with pytest.raises(RepositoryNotFoundError, match="no repository iic/nothing"):
        fetch_snapshot(spec("iic/nothing"), config)
    assert not (config.modelscope_cache_dir / "models").exists()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_names_the_token_setting_and_not_the_token(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, status: int
) -> None:
    """401 and 403 are a matter of access; the message never has the token."""
    modelscope.faults.status = status
    with pytest.raises(AccessDeniedError, match="EMB_PROVIDER_MODELSCOPE_TOKEN") as caught:
        fetch_snapshot(spec(MS_REPO), settings(modelscope_token="ms_secret"))
    assert "ms_secret" not in str(caught.value)


def test_a_hub_that_is_down_is_unavailable(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """503 is the hub's trouble, and is said in one line."""
    modelscope.faults.status = 503
    with pytest.raises(HubUnavailableError, match="EMB_PROVIDER_MODELSCOPE_ENDPOINT") as caught:
        fetch_snapshot(spec(MS_REPO), settings())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../../escape.json", "/etc/escape", "a/../../b.json"])
def test_a_name_that_leaves_the_directory_is_refused(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, name: str
) -> None:
    """The client would write such a file; the repository is refused before it is asked to."""
    modelscope.faults.listed_too = [name]
    with pytest.raises(CorruptSnapshotError, match="outside its directory"):
        fetch_snapshot(spec(MS_REPO), settings())
    assert not modelscope.bodies()


def test_a_full_disk_is_said_to_be_full(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """No space left is an error that names the directory and its setting."""
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


def test_what_the_client_has_is_not_fetched_again(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, tmp_path: Path
) -> None:
    """Files that the client's cache already holds are checked and used: only the listing is asked for."""
    fetch_snapshot(spec(MS_REPO), settings())
    modelscope.forget()
    fetch_snapshot(spec(MS_REPO), settings(cache_dir=tmp_path / "other"))
    assert not modelscope.bodies()
