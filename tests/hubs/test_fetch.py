"""Fetching: which hub, what is used again, what happens offline, and the fallback."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import (
    CacheNotWritableError,
    CorruptSnapshotError,
    HubError,
    HubUnavailableError,
    OfflineError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.model_resolver import resolve_source
from emb_model_provider.model_spec import BUNDLED_MODEL, BUNDLED_REVISION
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS, model_files, spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.settings import HubSettings
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer


def the_manifest(config: HubSettings) -> Path:
    (path,) = config.cache_dir.rglob("*.json")
    return path


@pytest.mark.parametrize(
    ("name", "fields", "hub"),
    [
        ("acme/tiny", {}, "huggingface"),
        ("bert-base-uncased", {}, "huggingface"),
        ("damo/nlp_gte", {}, "modelscope"),
        ("iic/nlp_gte", {}, "modelscope"),
        ("iic/nlp_gte", {"source": "huggingface"}, "huggingface"),
        ("acme/tiny", {"source": "modelscope"}, "modelscope"),
        (BUNDLED_MODEL, {}, "bundled"),
        (BUNDLED_MODEL, {"revision": BUNDLED_REVISION}, "bundled"),
        (BUNDLED_MODEL, {"revision": "main"}, "huggingface"),
        (BUNDLED_MODEL, {"endpoint": "http://mirror"}, "huggingface"),
        (BUNDLED_MODEL, {"source": "huggingface"}, "huggingface"),
        ("/no/such/directory", {}, "local"),
        ("./no/such", {}, "local"),
    ],
)
def test_the_source_follows_from_the_name(name: str, fields: dict[str, str], hub: str) -> None:
    """An explicit source wins; `auto` goes by what the name is."""
    assert resolve_source(spec(name, **fields)) == hub


def test_a_directory_wins_over_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An existing directory of that name, or a path, is local whatever the name looks like."""
    (tmp_path / "iic" / "nlp_gte").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_source(spec("iic/nlp_gte")) == "local"
    assert resolve_source(spec("acme/tiny", path=tmp_path, source="huggingface")) == "local"


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_a_second_start_asks_nobody(
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    repo: str,
) -> None:
    """With a valid manifest the same snapshot comes back without a request."""
    first = fetch_snapshot(spec(repo), settings())
    huggingface.forget()
    modelscope.forget()
    assert fetch_snapshot(spec(repo), settings()) == first
    assert not huggingface.requests
    assert not modelscope.requests


def test_force_asks_the_hub_again_and_fetches_what_changed(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """A branch that moved is followed only when asked to."""
    first = fetch_snapshot(spec(MS_REPO), settings())
    modelscope.repos[MS_REPO]["vocab.txt"] = b"[PAD]\n[UNK]\nnew\n"
    modelscope.forget()
    assert fetch_snapshot(spec(MS_REPO), settings()) == first
    second = fetch_snapshot(spec(MS_REPO), settings(), force=True)
    assert second.digest != first.digest
    assert dict(modelscope.bodies()) == {"vocab.txt": 1}


def test_the_same_files_have_the_same_digest_wherever_they_lie(
    settings: Callable[..., HubSettings], tmp_path: Path
) -> None:
    """The digest is that of names and bytes: neither the hub nor the directory matters."""
    first = fetch_snapshot(spec(HF_REPO), settings())
    shutil.copytree(first.path, tmp_path / "copy")
    copy = fetch_snapshot(spec("x", path=tmp_path / "copy"), settings())
    assert copy.digest == first.digest
    (tmp_path / "copy" / "config.json").write_text("{}")
    assert fetch_snapshot(spec("x", path=tmp_path / "copy"), settings()).digest != first.digest


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_offline_uses_a_verified_snapshot_and_makes_no_request(
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    repo: str,
) -> None:
    """OFFLINE with a manifest serves; with none it is an error; either way no hub hears of it."""
    first = fetch_snapshot(spec(repo), settings())
    huggingface.forget()
    modelscope.forget()
    assert fetch_snapshot(spec(repo), settings(offline=True)) == first
    with pytest.raises(OfflineError, match="EMB_PROVIDER_OFFLINE"):
        fetch_snapshot(
            spec(repo, revision="other"), settings(offline=True, modelscope_fallback_to_huggingface=True)
        )
    assert not huggingface.requests
    assert not modelscope.requests


def test_offline_adopts_what_the_hugging_face_client_downloaded_whole(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """A download made with the client's own tool is used, since its listing lets each file be checked."""
    from huggingface_hub import snapshot_download

    config = settings(offline=True)
    snapshot_download(HF_REPO, cache_dir=config.hf_cache_dir, endpoint=huggingface.url)
    huggingface.forget()
    # Nothing is written for it: a cache directory that is none does not matter.
    snapshot = fetch_snapshot(spec(HF_REPO), settings(offline=True, cache_dir=Path("/dev/null")))
    assert snapshot.revision == huggingface.commit(HF_REPO)
    assert fetch_snapshot(spec(HF_REPO), config) == snapshot
    assert (snapshot.path / "model.safetensors").read_bytes() == WEIGHTS
    weights = (snapshot.path / "model.safetensors").resolve()
    weights.write_bytes(WEIGHTS[::-1])
    with pytest.raises(CorruptSnapshotError, match="wrong bytes"):
        fetch_snapshot(spec(HF_REPO), config)
    weights.unlink()
    with pytest.raises(OfflineError):
        fetch_snapshot(spec(HF_REPO), config)
    assert not huggingface.requests


def test_offline_does_not_adopt_what_the_modelscope_client_left(
    settings: Callable[..., HubSettings],
) -> None:
    """Files without a manifest cannot be checked: they do not exist, and the error says what to do."""
    config = settings()
    fetch_snapshot(spec(MS_REPO), config)
    the_manifest(config).unlink()
    with pytest.raises(OfflineError, match="EMB_PROVIDER_MODEL_PATH"):
        fetch_snapshot(spec(MS_REPO), settings(offline=True))


@pytest.mark.parametrize(
    "tamper",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"version": 1', '"version": 99'),
        lambda text: text.replace("config.json", "../../config.json"),
        lambda text: text.replace('"sha256": "', '"sha256": "0', 1),
        lambda text: text.replace(MS_REPO, "iic/other"),
        lambda text: json.dumps({**json.loads(text), "files": []}),
    ],
)
def test_a_manifest_that_is_not_whole_does_not_count(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, tamper: Callable[[str], str]
) -> None:
    """Cut off, empty, of another version, edited, or of another model: the hub is asked again."""
    config = settings()
    first = fetch_snapshot(spec(MS_REPO), config)
    manifest = the_manifest(config)
    manifest.write_text(tamper(manifest.read_text()))
    with pytest.raises(OfflineError):
        fetch_snapshot(spec(MS_REPO), settings(offline=True))
    modelscope.forget()
    assert fetch_snapshot(spec(MS_REPO), config) == first
    assert modelscope.requests
    assert fetch_snapshot(spec(MS_REPO), settings(offline=True)) == first


@pytest.mark.parametrize("damage", ["other bytes", "shorter", "gone"])
@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_a_file_that_changed_makes_the_snapshot_invalid(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, damage: str, repo: str
) -> None:
    """Offline that is an error; online the file is fetched again."""
    first = fetch_snapshot(spec(repo), settings())
    name = "model.safetensors" if repo == HF_REPO else "pytorch_model.bin"
    weights = (first.path / name).resolve()
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(WEIGHTS[::-1] if damage == "other bytes" else WEIGHTS[:-1])
    with pytest.raises((OfflineError, CorruptSnapshotError)):
        fetch_snapshot(spec(repo), settings(offline=True))
    assert fetch_snapshot(spec(repo), settings()) == first
    assert (first.path / name).read_bytes() == WEIGHTS


def test_a_new_time_stamp_alone_is_hashed_and_accepted(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """Touched files are read again, found the same, and the manifest is renewed: no request is made."""
    config = settings()
    first = fetch_snapshot(spec(MS_REPO), config)
    weights = first.path / "pytorch_model.bin"
    os.utime(weights, ns=(1, 1))
    modelscope.forget()
    phases: list[str] = []
    assert fetch_snapshot(spec(MS_REPO), config, lambda progress: phases.append(progress.phase)) == first
    assert phases == ["verify"]
    fetch_snapshot(spec(MS_REPO), config, lambda progress: phases.append(progress.phase))
    assert phases == ["verify"]
    assert not modelscope.requests


def test_time_stamps_cut_to_seconds_need_no_hashing(settings: Callable[..., HubSettings]) -> None:
    """A container image's layers keep whole seconds only; that is no change."""
    first = fetch_snapshot(spec(MS_REPO), settings())
    for file in first.files:
        seconds = (first.path / file.path).stat().st_mtime_ns // 10**9
        os.utime(first.path / file.path, ns=(seconds * 10**9, seconds * 10**9))
    seen: list[object] = []
    assert fetch_snapshot(spec(MS_REPO), settings(), seen.append) == first
    assert not seen


def test_another_endpoint_is_another_question(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """The same name at another endpoint may be another model: its manifest does not speak for this one."""
    fetch_snapshot(spec(HF_REPO), settings())
    huggingface.forget()
    fetch_snapshot(spec(HF_REPO, endpoint=huggingface.url.replace("127.0.0.1", "localhost")), settings())
    assert huggingface.requests


def test_the_models_own_cache_directory_wins(settings: Callable[..., HubSettings], tmp_path: Path) -> None:
    """A cache directory of the model's own is where its files go."""
    snapshot = fetch_snapshot(spec(MS_REPO, cache_dir=tmp_path / "own"), settings())
    assert snapshot.path.is_relative_to(tmp_path / "own")


@pytest.mark.parametrize("name", ["a/b/c", "../etc", "acme/..", "http://evil/x", "acme/ti ny", "-x/y"])
@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_name_that_cannot_be_a_repository_is_asked_of_nobody(
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    name: str,
    source: str,
) -> None:
    """Such a name never becomes a part of a path or of a URL."""
    with pytest.raises(RepositoryNotFoundError, match="EMB_PROVIDER_MODEL_NAME"):
        fetch_snapshot(spec(name, source=source), settings())
    assert not huggingface.requests + modelscope.requests


def test_a_revision_that_leaves_the_cache_is_asked_of_nobody(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """ModelScope's client would make a directory of it."""
    with pytest.raises(HubError, match="EMB_PROVIDER_MODEL_REVISION"):
        fetch_snapshot(spec(MS_REPO, revision="../../x"), settings())
    assert not modelscope.requests


def test_falls_back_to_hugging_face_when_asked_to(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that ModelScope lacks comes from Hugging Face, which the log and the snapshot say."""
    huggingface.repos["iic/other"] = model_files()
    with pytest.raises(RepositoryNotFoundError):
        fetch_snapshot(spec("iic/other"), settings())
    with caplog.at_level(logging.WARNING):
        snapshot = fetch_snapshot(
            spec("iic/other", revision="master", token="ms_secret"),
            settings(modelscope_fallback_to_huggingface=True),
        )
    assert snapshot.hub == "huggingface"
    assert "ModelScope has no repository iic/other" in caplog.text
    assert "ms_secret" not in caplog.text
    assert all("authorization" not in request.headers for request in huggingface.requests)


@pytest.mark.parametrize("status", [401, 403, 503])
def test_falls_back_when_modelscope_refuses_or_is_down(
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    status: int,
) -> None:
    """Whatever keeps ModelScope from giving the model, the other hub is tried."""
    huggingface.repos[MS_REPO] = model_files()
    modelscope.faults.status = status
    assert (
        fetch_snapshot(spec(MS_REPO), settings(modelscope_fallback_to_huggingface=True)).hub == "huggingface"
    )


def test_offline_falls_back_to_what_was_taken_from_hugging_face(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, modelscope: ModelScopeServer
) -> None:
    """A snapshot that came by the fallback is found again without a request."""
    huggingface.repos["iic/other"] = model_files()
    first = fetch_snapshot(spec("iic/other"), settings(modelscope_fallback_to_huggingface=True))
    huggingface.forget()
    modelscope.forget()
    assert (
        fetch_snapshot(spec("iic/other"), settings(modelscope_fallback_to_huggingface=True, offline=True))
        == first
    )
    assert not huggingface.requests + modelscope.requests


def test_when_both_hubs_fail_the_error_has_both_reasons(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """Neither reason hides the other."""
    huggingface.faults.status = 503
    with pytest.raises(HubUnavailableError) as caught:
        fetch_snapshot(spec("iic/other"), settings(modelscope_fallback_to_huggingface=True))
    assert "ModelScope has no repository iic/other" in str(caught.value)
    assert "Hugging Face answered HTTP 503" in str(caught.value)


def test_hugging_face_never_falls_back(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """The fallback goes one way."""
    with pytest.raises(RevisionNotFoundError):
        fetch_snapshot(spec(HF_REPO, revision="none"), settings(modelscope_fallback_to_huggingface=True))
    assert not modelscope.requests


def test_a_cache_that_is_a_file_is_said_not_to_be_writable(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, tmp_path: Path
) -> None:
    """A manifest that could not be written is noticed before anything is fetched; no fallback hides it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheNotWritableError, match="EMB_PROVIDER_CACHE_DIR"):
        fetch_snapshot(
            spec(MS_REPO), settings(cache_dir=tmp_path / "file", modelscope_fallback_to_huggingface=True)
        )
    assert not modelscope.requests


def test_a_token_is_never_shown_by_a_configuration(settings: Callable[..., HubSettings]) -> None:
    """Specs, settings and hub configurations print without their tokens."""
    from emb_model_provider.hubs.base import HubConfig

    config = settings(hf_token="hf_secret", modelscope_token="ms_secret")
    hub = HubConfig(None, config.cache_dir, token="own_secret")
    assert "secret" not in repr((spec("a/b", token="own_secret"), config, hub))


def test_two_threads_at_once_transfer_each_file_once(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """Two models of one service that are the same repository are fetched once."""
    modelscope.faults.hold_after["pytorch_model.bin"] = 1_000
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(fetch_snapshot, spec(MS_REPO), settings()) for _ in range(2)]
        while not modelscope.bodies()["pytorch_model.bin"]:
            time.sleep(0.02)
        time.sleep(0.3)
        modelscope.faults.release.set()
        first, second = (future.result() for future in futures)
    assert first == second
    assert set(modelscope.bodies().values()) == {1}
    assert modelscope.asked("/revisions") == 1


def test_a_client_is_imported_only_when_its_hub_is_chosen() -> None:
    """Serving the bundled model loads neither client (nor torch)."""
    code = (
        "import sys, pathlib; from emb_model_provider.hubs.fetch import fetch_snapshot;"
        "from emb_model_provider.model_spec import BUNDLED_MODEL, ModelSpec;"
        "from emb_model_provider.settings import HubSettings;"
        "fetch_snapshot(ModelSpec(alias='a', name=BUNDLED_MODEL), HubSettings(cache_dir=pathlib.Path('/dev/null')));"
        "print({'huggingface_hub', 'modelscope_hub', 'modelscope', 'torch', 'transformers'} & set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "set()\n"
    )
