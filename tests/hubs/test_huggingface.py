"""Hugging Face: its real client against a server of ours."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import (
    AccessDeniedError,
    CorruptSnapshotError,
    HubUnavailableError,
    IncompleteRepositoryError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from emb_model_provider.hubs.fetch import fetch_snapshot
from tests.hubs.conftest import HF_REPO, WEIGHTS, spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.hubs.base import Progress
    from emb_model_provider.settings import HubSettings
    from tests.hubs.servers import HuggingFaceServer


def test_fetches_hashes_and_pins_what_serving_needs(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """A snapshot names the commit, holds the needed files with their sha256, and none of the duplicates."""
    snapshot = fetch_snapshot(spec(HF_REPO), settings())
    assert snapshot.hub == "huggingface"
    assert snapshot.revision == huggingface.commit(HF_REPO)
    assert [file.path for file in snapshot.files] == [
        "1_Pooling/config.json",
        "README.md",
        "config.json",
        "model.safetensors",
        "modules.json",
        "tokenizer.json",
    ]
    weights = snapshot.files[3]
    assert weights.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert (snapshot.path / "model.safetensors").read_bytes() == WEIGHTS
    assert "pytorch_model.bin" not in huggingface.bodies()


def test_a_large_file_comes_from_the_host_it_is_redirected_to_without_the_token(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """The redirect to another host is followed, and that host never sees the token."""
    huggingface.token = "hf_secret"
    fetch_snapshot(spec(HF_REPO, token="hf_secret"), settings())
    stored = [request for request in huggingface.requests if request.storage]
    assert [request.path.rpartition("/")[2] for request in stored] == ["model.safetensors"]
    assert "authorization" not in stored[0].headers


def test_progress_counts_all_files_as_one_total(settings: Callable[..., HubSettings]) -> None:
    """Download and verification end at the total of all files, in bytes."""
    seen: list[Progress] = []
    snapshot = fetch_snapshot(spec(HF_REPO), settings(), seen.append)
    total = sum(file.size for file in snapshot.files)
    downloads = [progress.done_bytes for progress in seen if progress.phase == "download"]
    assert downloads[0] == 0
    assert downloads[-1] == total
    assert downloads == sorted(downloads)
    assert seen[-1].phase == "verify"
    assert seen[-1].done_bytes == seen[-1].total_bytes == total


def test_nothing_is_drawn_by_the_client(
    settings: Callable[..., HubSettings], capfd: pytest.CaptureFixture[str]
) -> None:
    """The client's own bars do not reach the terminal."""
    fetch_snapshot(spec(HF_REPO), settings())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_wrong_bytes_are_fetched_again(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, path: str
) -> None:
    """Wrong bytes of the right size, which the client installs, are noticed and replaced."""
    huggingface.faults.wrong_bytes[path] = 1
    snapshot = fetch_snapshot(spec(HF_REPO), settings())
    assert (snapshot.path / path).read_bytes() == huggingface.repos[HF_REPO][path]
    assert huggingface.bodies()[path] == 2


def test_bytes_that_stay_wrong_are_removed_and_refused(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """After a second time the file is gone from the client's store too, and no manifest exists."""
    config = settings()
    huggingface.faults.wrong_bytes["model.safetensors"] = 9
    with pytest.raises(CorruptSnapshotError, match="arrived twice"):
        fetch_snapshot(spec(HF_REPO), config)
    sizes = {path.stat().st_size for path in config.hf_cache_dir.rglob("*") if path.is_file()}
    assert len(WEIGHTS) not in sizes
    assert not list(config.cache_dir.rglob("*.json"))
    huggingface.faults.wrong_bytes.clear()
    assert (fetch_snapshot(spec(HF_REPO), config).path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_dropped_connection_is_taken_up_again(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """A transfer that breaks off goes on from the client's last whole chunk (10 MiB)."""
    weights = bytes(12 << 20)
    huggingface.repos[HF_REPO]["model.safetensors"] = weights
    huggingface.faults.drop_after["model.safetensors"] = [11 << 20]
    snapshot = fetch_snapshot(spec(HF_REPO), settings())
    assert (snapshot.path / "model.safetensors").read_bytes() == weights
    ranges = [request.headers.get("range") for request in huggingface.requests if request.storage]
    assert ranges == [None, f"bytes={10 << 20}-"]


def test_an_unknown_revision_is_named_with_those_that_exist(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """The error for a revision that does not exist lists some that do."""
    huggingface.revisions = ("main", "v2")
    with pytest.raises(
        RevisionNotFoundError, match=r"'v9'; it has main, v2\. Set EMB_PROVIDER_MODEL_REVISION"
    ):
        fetch_snapshot(spec(HF_REPO, revision="v9"), settings())


def test_a_missing_repository_is_said_to_be_missing(settings: Callable[..., HubSettings]) -> None:
    """A repository that does not exist gives its own error, which names the settings to look at."""
    with pytest.raises(RepositoryNotFoundError, match=r"no repository acme/nothing.*EMB_PROVIDER_HF_TOKEN"):
        fetch_snapshot(spec("acme/nothing"), settings())


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_names_the_token_setting_and_not_the_token(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, status: int
) -> None:
    """401 and 403 are a matter of access; the message never has the token."""
    huggingface.faults.status = status
    huggingface.faults.error_code = "GatedRepo" if status == 403 else None
    with pytest.raises((AccessDeniedError, RepositoryNotFoundError), match="EMB_PROVIDER_HF_TOKEN") as caught:
        fetch_snapshot(spec(HF_REPO), settings(hf_token="hf_secret"))
    assert isinstance(caught.value, AccessDeniedError)
    assert "hf_secret" not in str(caught.value)


def test_the_token_is_sent(settings: Callable[..., HubSettings], huggingface: HuggingFaceServer) -> None:
    """A private repository opens with the settings' token, and the model's own wins over it."""
    huggingface.token = "hf_right"
    with pytest.raises(AccessDeniedError):
        fetch_snapshot(spec(HF_REPO), settings(hf_token="hf_wrong"))
    assert fetch_snapshot(spec(HF_REPO, token="hf_right"), settings(hf_token="hf_wrong"))


def test_a_hub_that_is_down_is_unavailable(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """503 is the hub's trouble, not the model's."""
    huggingface.faults.status = 503
    with pytest.raises(HubUnavailableError, match=r"HTTP 503.*EMB_PROVIDER_HF_ENDPOINT"):
        fetch_snapshot(spec(HF_REPO), settings())


def test_a_hub_that_cannot_be_reached_is_unavailable(settings: Callable[..., HubSettings]) -> None:
    """No listener at the endpoint gives one line that names the endpoint's setting."""
    with pytest.raises(HubUnavailableError, match="EMB_PROVIDER_HF_ENDPOINT") as caught:
        fetch_snapshot(spec(HF_REPO), settings(hf_endpoint="http://127.0.0.1:9"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../../escape.json", "/etc/escape", "a/../../b.json", "a\\b.json"])
def test_a_name_that_leaves_the_directory_is_refused(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, name: str
) -> None:
    """A repository with such a file name is refused before any of its files is fetched."""
    huggingface.faults.listed_too = [name]
    with pytest.raises(CorruptSnapshotError, match="outside its directory"):
        fetch_snapshot(spec(HF_REPO), settings())
    assert not huggingface.bodies()


def test_a_commit_that_is_none_is_refused(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub whose commit would leave the cache's directory is not believed."""
    monkeypatch.setattr(huggingface, "commit", lambda repo: "../../../escape")
    with pytest.raises(HubUnavailableError, match="which commit"):
        fetch_snapshot(spec(HF_REPO), settings())


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ({"config.json", "modules.json"}, "no config.json"),
        ({"model.safetensors", "pytorch_model.bin"}, "no weights.*only an export"),
    ],
)
def test_a_repository_without_a_model_is_refused(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, missing: set[str], said: str
) -> None:
    """Without a configuration or weights nothing is fetched."""
    for name in missing:
        del huggingface.repos[HF_REPO][name]
    with pytest.raises(IncompleteRepositoryError, match=said):
        fetch_snapshot(spec(HF_REPO), settings())
    assert not huggingface.bodies()


def test_a_missing_shard_is_noticed(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """An index that names a shard the repository lacks makes the snapshot incomplete."""
    files = huggingface.repos[HF_REPO]
    files["model-00001-of-00002.safetensors"] = files.pop("model.safetensors")
    files["model.safetensors.index.json"] = (
        b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    with pytest.raises(IncompleteRepositoryError, match=r"model-00002-of-00002.safetensors"):
        fetch_snapshot(spec(HF_REPO), settings())
    files["model-00002-of-00002.safetensors"] = b"the rest"
    paths = [file.path for file in fetch_snapshot(spec(HF_REPO), settings()).files]
    assert "model-00002-of-00002.safetensors" in paths
    assert "pytorch_model.bin" not in paths
