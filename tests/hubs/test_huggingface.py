"""HuggingFaceHub, with the real client and a local server."""

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

    from emb_model_provider.progress import Progress
    from emb_model_provider.settings import HubSettings
    from tests.hubs.servers import HuggingFaceServer


def test_download_of_the_files_that_serving_needs(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """A snapshot has the commit and the hashes of its files, and no duplicate of the weights."""
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


def test_token_is_not_sent_to_the_storage_host(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """The redirect of a large file is followed."""
    huggingface.token = "hf_secret"
    fetch_snapshot(spec(HF_REPO, token="hf_secret"), settings())
    stored = [request for request in huggingface.requests if request.storage]
    assert [request.path.rpartition("/")[2] for request in stored] == ["model.safetensors"]
    assert "authorization" not in stored[0].headers


def test_progress_ends_at_the_size_of_all_files(settings: Callable[..., HubSettings]) -> None:
    seen: list[Progress] = []
    snapshot = fetch_snapshot(spec(HF_REPO), settings(), seen.append)
    total = sum(file.size for file in snapshot.files)
    downloads = [progress.done_bytes for progress in seen if progress.phase == "download"]
    assert downloads[0] == 0
    assert downloads[-1] == total
    assert downloads == sorted(downloads)
    assert seen[-1].phase == "verify"
    assert seen[-1].done_bytes == seen[-1].total_bytes == total


def test_client_draws_no_progress_bars(settings: Callable[..., HubSettings], capfd: pytest.CaptureFixture[str]) -> None:
    fetch_snapshot(spec(HF_REPO), settings())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_wrong_bytes_are_downloaded_again(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, path: str
) -> None:
    """The client does not notice wrong bytes of the right size."""
    huggingface.faults.wrong_bytes[path] = 1
    snapshot = fetch_snapshot(spec(HF_REPO), settings())
    assert (snapshot.path / path).read_bytes() == huggingface.repos[HF_REPO][path]
    assert huggingface.bodies()[path] == 2


def test_bytes_that_are_wrong_twice_are_an_error(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """The file is removed from the client's cache, too, and there is no manifest."""
    config = settings()
    huggingface.faults.wrong_bytes["model.safetensors"] = 9
    with pytest.raises(CorruptSnapshotError, match="downloaded twice"):
        fetch_snapshot(spec(HF_REPO), config)
    sizes = {path.stat().st_size for path in config.hf_cache_dir.rglob("*") if path.is_file()}
    assert len(WEIGHTS) not in sizes
    assert not list(config.cache_dir.rglob("*.json"))
    huggingface.faults.wrong_bytes.clear()
    assert (fetch_snapshot(spec(HF_REPO), config).path / "model.safetensors").read_bytes() == WEIGHTS


def test_dropped_connection_is_resumed(settings: Callable[..., HubSettings], huggingface: HuggingFaceServer) -> None:
    """The transfer continues after the client's last complete chunk (10 MiB)."""
    weights = bytes(12 << 20)
    huggingface.repos[HF_REPO]["model.safetensors"] = weights
    huggingface.faults.drop_after["model.safetensors"] = [11 << 20]
    snapshot = fetch_snapshot(spec(HF_REPO), settings())
    assert (snapshot.path / "model.safetensors").read_bytes() == weights
    ranges = [request.headers.get("range") for request in huggingface.requests if request.storage]
    assert ranges == [None, f"bytes={10 << 20}-"]


def test_error_of_an_unknown_revision_names_existing_ones(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    huggingface.revisions = ("main", "v2")
    with pytest.raises(RevisionNotFoundError, match=r"'v9'; it has main, v2\. Name one of them: `--revision`, or EMB"):
        fetch_snapshot(spec(HF_REPO, revision="v9"), settings())


def test_missing_repository(settings: Callable[..., HubSettings]) -> None:
    with pytest.raises(RepositoryNotFoundError, match=r"no repository acme/nothing.*EMB_PROVIDER_HF_TOKEN"):
        fetch_snapshot(spec("acme/nothing"), settings())


@pytest.mark.parametrize("status", [401, 403])
def test_denied_access_names_the_setting_but_not_the_token(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, status: int
) -> None:
    huggingface.faults.status = status
    huggingface.faults.error_code = "GatedRepo" if status == 403 else None
    with pytest.raises((AccessDeniedError, RepositoryNotFoundError), match="EMB_PROVIDER_HF_TOKEN") as caught:
        fetch_snapshot(spec(HF_REPO), settings(hf_token="hf_secret"))
    assert isinstance(caught.value, AccessDeniedError)
    assert "hf_secret" not in str(caught.value)


def test_rejected_token_of_the_client_itself(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    huggingface.faults.status = 403
    with pytest.raises(AccessDeniedError, match="the token was rejected"):
        fetch_snapshot(spec(HF_REPO), settings())


def test_token_gives_access_to_a_private_repository(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """The token of the model takes precedence over that of the settings."""
    huggingface.token = "hf_right"
    with pytest.raises(AccessDeniedError):
        fetch_snapshot(spec(HF_REPO), settings(hf_token="hf_wrong"))
    assert fetch_snapshot(spec(HF_REPO, token="hf_right"), settings(hf_token="hf_wrong"))


def test_http_503_is_an_unavailable_hub(settings: Callable[..., HubSettings], huggingface: HuggingFaceServer) -> None:
    huggingface.faults.status = 503
    with pytest.raises(HubUnavailableError, match=r"HTTP 503.*EMB_PROVIDER_HF_ENDPOINT"):
        fetch_snapshot(spec(HF_REPO), settings())


def test_refused_connection_is_an_unavailable_hub(settings: Callable[..., HubSettings]) -> None:
    with pytest.raises(HubUnavailableError, match="EMB_PROVIDER_HF_ENDPOINT") as caught:
        fetch_snapshot(spec(HF_REPO), settings(hf_endpoint="http://127.0.0.1:9"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../../escape.json", "/etc/escape", "a/../../b.json", "a\\b.json"])
def test_path_outside_the_directory_is_rejected(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, name: str
) -> None:
    """Nothing is downloaded."""
    huggingface.faults.listed_too = [name]
    with pytest.raises(CorruptSnapshotError, match="outside its directory"):
        fetch_snapshot(spec(HF_REPO), settings())
    assert not huggingface.bodies()


def test_invalid_commit_is_rejected(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would become a part of a path."""
    monkeypatch.setattr(huggingface, "commit", lambda repo: "../../../escape")
    with pytest.raises(HubUnavailableError, match="no valid commit"):
        fetch_snapshot(spec(HF_REPO), settings())


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"config.json", "modules.json"}, "no config.json"),
        ({"model.safetensors", "pytorch_model.bin", "onnx/model.onnx"}, "only TensorFlow weights"),
    ],
)
def test_repository_without_a_model_is_rejected(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, missing: set[str], message: str
) -> None:
    """Nothing is downloaded."""
    for name in missing:
        del huggingface.repos[HF_REPO][name]
    with pytest.raises(IncompleteRepositoryError, match=message):
        fetch_snapshot(spec(HF_REPO), settings())
    assert not huggingface.bodies()


def test_missing_shard_is_an_error(settings: Callable[..., HubSettings], huggingface: HuggingFaceServer) -> None:
    files = huggingface.repos[HF_REPO]
    files["model-00001-of-00002.safetensors"] = files.pop("model.safetensors")
    files["model.safetensors.index.json"] = (
        b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    with pytest.raises(IncompleteRepositoryError, match=r"model-00002-of-00002.safetensors"):
        fetch_snapshot(spec(HF_REPO), settings())
    files["model-00002-of-00002.safetensors"] = b"the second part"
    paths = [file.path for file in fetch_snapshot(spec(HF_REPO), settings()).files]
    assert "model-00002-of-00002.safetensors" in paths
    assert "pytorch_model.bin" not in paths
