"""fetch_snapshot: the choice of the hub, reuse of snapshots, offline operation, and the fallback."""

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
    IncompleteRepositoryError,
    OfflineError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.model_resolver import resolve_source
from emb_model_provider.model_spec import BUNDLED_MODEL, BUNDLED_REVISION
from emb_model_provider.snapshots import manifest
from emb_model_provider.snapshots.manifest import FilePatterns
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS, model_files, spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.settings import HubSettings
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer


NAMES = {"acme/model": {"modelscope": MS_REPO, "huggingface": HF_REPO}}


def only_manifest(config: HubSettings) -> Path:
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
def test_source_is_resolved_from_the_name(name: str, fields: dict[str, str], hub: str) -> None:
    """An explicit source takes precedence."""
    assert resolve_source(spec(name, **fields)) == hub


def test_existing_directory_takes_precedence_over_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "iic" / "nlp_gte").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_source(spec("iic/nlp_gte")) == "local"
    assert resolve_source(spec("acme/tiny", path=tmp_path, source="huggingface")) == "local"


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_snapshot_with_a_manifest_needs_no_request(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, modelscope: ModelScopeServer, repo: str
) -> None:
    first = fetch_snapshot(spec(repo), settings())
    huggingface.forget()
    modelscope.forget()
    assert fetch_snapshot(spec(repo), settings()) == first
    assert not huggingface.requests
    assert not modelscope.requests


def test_force_downloads_what_changed(settings: Callable[..., HubSettings], modelscope: ModelScopeServer) -> None:
    """A branch that has moved is followed only with `force`."""
    first = fetch_snapshot(spec(MS_REPO), settings())
    modelscope.repos[MS_REPO]["vocab.txt"] = b"[PAD]\n[UNK]\nnew\n"
    modelscope.forget()
    assert fetch_snapshot(spec(MS_REPO), settings()) == first
    second = fetch_snapshot(spec(MS_REPO), settings(), force=True)
    assert second.digest != first.digest
    assert dict(modelscope.bodies()) == {"vocab.txt": 1}


def test_digest_depends_on_names_and_bytes_only(settings: Callable[..., HubSettings], tmp_path: Path) -> None:
    """The hub and the directory do not matter."""
    first = fetch_snapshot(spec(HF_REPO), settings())
    shutil.copytree(first.path, tmp_path / "copy")
    copy = fetch_snapshot(spec("x", path=tmp_path / "copy"), settings())
    assert copy.digest == first.digest
    (tmp_path / "copy" / "config.json").write_text("{}")
    assert fetch_snapshot(spec("x", path=tmp_path / "copy"), settings()).digest != first.digest


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_offline_uses_a_verified_snapshot(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, modelscope: ModelScopeServer, repo: str
) -> None:
    """Without one it is an error; in both cases no hub is asked."""
    first = fetch_snapshot(spec(repo), settings())
    huggingface.forget()
    modelscope.forget()
    assert fetch_snapshot(spec(repo), settings(offline=True)) == first
    with pytest.raises(OfflineError, match="EMB_PROVIDER_OFFLINE"):
        fetch_snapshot(spec(repo, revision="other"), settings(offline=True, modelscope_fallback_to_huggingface=True))
    assert not huggingface.requests
    assert not modelscope.requests


def test_offline_adopts_a_download_of_the_hugging_face_client(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """Each file is checked against the listing that the client has kept."""
    from huggingface_hub import snapshot_download

    config = settings(offline=True)
    snapshot_download(HF_REPO, cache_dir=config.hf_cache_dir, endpoint=huggingface.url)
    huggingface.forget()
    # Nothing has to be written, so an invalid cache directory does not matter.
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


def test_offline_does_not_adopt_a_download_of_the_modelscope_client(settings: Callable[..., HubSettings]) -> None:
    """Files without a manifest cannot be checked, and the error says what to do."""
    config = settings()
    fetch_snapshot(spec(MS_REPO), config)
    only_manifest(config).unlink()
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
def test_invalid_manifest_is_ignored(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, tamper: Callable[[str], str]
) -> None:
    """Truncated, empty, of another version, edited, or of another model: the hub is asked again."""
    config = settings()
    first = fetch_snapshot(spec(MS_REPO), config)
    manifest = only_manifest(config)
    manifest.write_text(tamper(manifest.read_text()))
    with pytest.raises(OfflineError):
        fetch_snapshot(spec(MS_REPO), settings(offline=True))
    modelscope.forget()
    assert fetch_snapshot(spec(MS_REPO), config) == first
    assert modelscope.requests
    assert fetch_snapshot(spec(MS_REPO), settings(offline=True)) == first


@pytest.mark.parametrize("damage", ["other bytes", "shorter", "missing"])
@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_changed_file_invalidates_the_snapshot(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, damage: str, repo: str
) -> None:
    """Offline that is an error, online the file is downloaded again."""
    first = fetch_snapshot(spec(repo), settings())
    name = "model.safetensors" if repo == HF_REPO else "pytorch_model.bin"
    weights = (first.path / name).resolve()
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(WEIGHTS[::-1] if damage == "other bytes" else WEIGHTS[:-1])
    with pytest.raises((OfflineError, CorruptSnapshotError)):
        fetch_snapshot(spec(repo), settings(offline=True))
    assert fetch_snapshot(spec(repo), settings()) == first
    assert (first.path / name).read_bytes() == WEIGHTS


def test_file_with_a_new_time_stamp_is_hashed_once(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """Its hash is unchanged, so the manifest is updated and no request is made."""
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


def test_time_stamps_in_seconds_need_no_hashing(settings: Callable[..., HubSettings]) -> None:
    """The layers of a container image keep whole seconds only."""
    first = fetch_snapshot(spec(MS_REPO), settings())
    for file in first.files:
        seconds = (first.path / file.path).stat().st_mtime_ns // 10**9
        os.utime(first.path / file.path, ns=(seconds * 10**9, seconds * 10**9))
    seen: list[object] = []
    assert fetch_snapshot(spec(MS_REPO), settings(), seen.append) == first
    assert not seen


@pytest.mark.parametrize("ending", ["", "/"])
def test_manifest_is_valid_for_every_endpoint(
    ending: str, settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, tmp_path: Path
) -> None:
    """The endpoint is only recorded, without a slash at its end."""
    first = fetch_snapshot(spec(HF_REPO), settings(hf_endpoint=huggingface.url + ending))
    huggingface.forget()
    assert fetch_snapshot(spec(HF_REPO), settings(hf_endpoint="http://127.0.0.1:9")) == first
    assert fetch_snapshot(spec(HF_REPO, endpoint=huggingface.url), settings()) == first
    assert huggingface.requests == []
    ((key, _),) = manifest.load_all(tmp_path / "cache" / "snapshots")
    assert key.endpoint == huggingface.url


@pytest.mark.parametrize("is_verified", [True, False])
def test_copy_on_disk_is_preferred_over_another_hub(
    is_verified: bool,
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
) -> None:
    """If no hub is named; also a copy that another program has downloaded, which is verified first."""
    modelscope.repos[HF_REPO] = huggingface.repos[HF_REPO]
    first = fetch_snapshot(spec(HF_REPO, source="modelscope"), settings())
    if not is_verified:
        shutil.rmtree(settings().cache_dir)
    assert fetch_snapshot(spec(HF_REPO), settings()) == first
    assert huggingface.requests == []
    assert fetch_snapshot(spec(HF_REPO, source="huggingface"), settings()).hub == "huggingface"
    assert fetch_snapshot(spec(HF_REPO), settings()).hub == "huggingface"
    other_revision = fetch_snapshot(spec(HF_REPO, revision="main"), settings())
    assert other_revision.hub == "huggingface"


def test_cache_directory_of_a_model_takes_precedence(settings: Callable[..., HubSettings], tmp_path: Path) -> None:
    snapshot = fetch_snapshot(spec(MS_REPO, cache_dir=tmp_path / "own"), settings())
    assert snapshot.path.is_relative_to(tmp_path / "own")


@pytest.mark.parametrize("name", ["a/b/c", "../etc", "acme/..", "http://evil/x", "acme/ti ny", "-x/y"])
@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_invalid_repository_id_is_rejected_without_a_request(
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    name: str,
    source: str,
) -> None:
    """Such a name never becomes a part of a path or a URL."""
    with pytest.raises(RepositoryNotFoundError, match="neither a directory on this machine nor a repository id"):
        fetch_snapshot(spec(name, source=source), settings())
    assert not huggingface.requests + modelscope.requests


def test_invalid_revision_is_rejected_without_a_request(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """ModelScope's client would use it as a directory."""
    with pytest.raises(HubError, match="is not a valid branch, tag or commit"):
        fetch_snapshot(spec(MS_REPO, revision="../../x"), settings())
    assert not modelscope.requests


def test_fallback_to_hugging_face(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The log and the snapshot name the hub, which does not receive ModelScope's token."""
    huggingface.repos["iic/other"] = model_files()
    with pytest.raises(RepositoryNotFoundError):
        fetch_snapshot(spec("iic/other"), settings())
    with caplog.at_level(logging.WARNING):
        snapshot = fetch_snapshot(
            spec("iic/other", revision="master", token="ms_secret"), settings(modelscope_fallback_to_huggingface=True)
        )
    assert snapshot.hub == "huggingface"
    assert "ModelScope has no repository iic/other" in caplog.text
    assert "ms_secret" not in caplog.text
    assert all("authorization" not in request.headers for request in huggingface.requests)


@pytest.mark.parametrize("status", [401, 403, 503])
def test_fallback_if_modelscope_returns_an_error(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, modelscope: ModelScopeServer, status: int
) -> None:
    huggingface.repos[MS_REPO] = model_files()
    modelscope.faults.status = status
    assert fetch_snapshot(spec(MS_REPO), settings(modelscope_fallback_to_huggingface=True)).hub == "huggingface"


def test_offline_uses_a_snapshot_of_the_fallback(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, modelscope: ModelScopeServer
) -> None:
    huggingface.repos["iic/other"] = model_files()
    first = fetch_snapshot(spec("iic/other"), settings(modelscope_fallback_to_huggingface=True))
    huggingface.forget()
    modelscope.forget()
    assert fetch_snapshot(spec("iic/other"), settings(modelscope_fallback_to_huggingface=True, offline=True)) == first
    assert not huggingface.requests + modelscope.requests


def test_error_names_the_reasons_of_both_hubs(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    huggingface.faults.status = 503
    with pytest.raises(HubUnavailableError) as caught:
        fetch_snapshot(spec("iic/other"), settings(modelscope_fallback_to_huggingface=True))
    assert "ModelScope has no repository iic/other" in str(caught.value)
    assert "Hugging Face answered HTTP 503" in str(caught.value)


def test_no_fallback_from_hugging_face(settings: Callable[..., HubSettings], modelscope: ModelScopeServer) -> None:
    with pytest.raises(RevisionNotFoundError):
        fetch_snapshot(spec(HF_REPO, revision="none"), settings(modelscope_fallback_to_huggingface=True))
    assert not modelscope.requests


def test_unwritable_cache_is_an_error_before_the_download(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, tmp_path: Path
) -> None:
    """There is no fallback, because another hub would not help."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheNotWritableError, match="EMB_PROVIDER_CACHE_DIR"):
        fetch_snapshot(spec(MS_REPO), settings(cache_dir=tmp_path / "file", modelscope_fallback_to_huggingface=True))
    assert not modelscope.requests


def test_token_is_not_in_the_repr_of_a_configuration(settings: Callable[..., HubSettings]) -> None:
    from emb_model_provider.hubs.base import HubConfig

    config = settings(hf_token="hf_secret", modelscope_token="ms_secret")
    hub = HubConfig(None, config.cache_dir, token="own_secret")
    assert "secret" not in repr((spec("a/b", token="own_secret"), config, hub))


def test_two_threads_download_each_file_once(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """Two models of one service can be the same repository."""
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


def test_client_is_imported_only_if_its_hub_is_used() -> None:
    """The bundled model needs neither client (nor torch)."""
    code = (
        "import sys, pathlib; from emb_model_provider.hubs.fetch import fetch_snapshot;"
        "from emb_model_provider.model_spec import BUNDLED_MODEL, ModelSpec;"
        "from emb_model_provider.settings import HubSettings;"
        "fetch_snapshot(ModelSpec(alias='a', name=BUNDLED_MODEL), HubSettings(cache_dir=pathlib.Path('/dev/null')));"
        "print({'huggingface_hub', 'modelscope_hub', 'modelscope', 'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize(("source", "repo"), [("modelscope", MS_REPO), ("huggingface", HF_REPO)])
def test_model_is_requested_under_the_name_of_its_hub(
    settings: Callable[..., HubSettings], source: str, repo: str
) -> None:
    """The snapshot has the hub's name."""
    snapshot = fetch_snapshot(spec("acme/model", source=source), settings(hub_names=NAMES))
    assert (snapshot.hub, snapshot.repository) == (source, repo)
    assert fetch_snapshot(spec(repo, source=source), settings()) == snapshot


def test_fallback_uses_the_name_of_the_other_hub(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    modelscope.repos.clear()
    config = settings(hub_names=NAMES, modelscope_fallback_to_huggingface=True)
    snapshot = fetch_snapshot(spec("acme/model", source="modelscope"), config)
    assert (snapshot.hub, snapshot.repository) == ("huggingface", HF_REPO)


def test_invalid_mapped_name_is_rejected(settings: Callable[..., HubSettings]) -> None:
    with pytest.raises(HubError, match="neither a directory on this machine nor a repository id"):
        fetch_snapshot(
            spec("acme/model", source="huggingface"), settings(hub_names={"acme/model": {"huggingface": "../../etc"}})
        )


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_download_with_patterns_has_its_own_manifest(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, modelscope: ModelScopeServer, repo: str
) -> None:
    """Only matching files are downloaded; a later download of the whole model is complete."""
    config = settings()
    patterns = FilePatterns(("*.json",), ("1_Pooling/*",))
    part = fetch_snapshot(spec(repo), config, patterns=patterns)
    names = {file.path for file in part.files}
    assert "config.json" in names
    assert all(name.endswith(".json") and "/" not in name for name in names)
    whole = fetch_snapshot(spec(repo), config)
    assert names < {file.path for file in whole.files}
    huggingface.forget()
    modelscope.forget()
    assert fetch_snapshot(spec(repo), config, patterns=patterns) == part
    assert fetch_snapshot(spec(repo), config) == whole
    assert not huggingface.requests + modelscope.requests


def test_patterns_without_a_match_are_an_error(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """So are patterns that match only files that serving never needs."""
    assert "onnx/model.onnx" in model_files()
    with pytest.raises(IncompleteRepositoryError, match=r"include: \*\.onnx"):
        fetch_snapshot(spec(HF_REPO), settings(), patterns=FilePatterns(("*.onnx",)))
    assert not huggingface.bodies()
