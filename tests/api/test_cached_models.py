"""Models on disk are listed, described, verified and removed over HTTP."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.snapshots.locks import FileLock, SnapshotLocks
from emb_model_provider.snapshots.manifest import ManifestKey
from tests.api.helpers import (
    blocked_reader,
    cached_models,
    download,
    load,
    remove,
    replace_with_pipe,
    served_models,
    small_repository,
    unload,
)
from tests.service import assert_error

if TYPE_CHECKING:
    from tests.hubs.servers import HuggingFaceServer
    from tests.service import Service


@pytest.fixture(autouse=True)
def repositories(hub: HuggingFaceServer) -> None:
    """Add repositories that can be downloaded and not loaded."""
    for seed, name in enumerate(("acme/one", "acme/two", "acme/damaged", "acme/old")):
        hub.repos.setdefault(name, small_repository(seed))


@pytest.fixture(scope="module")
def small_model(managed: Service, small_hub: HuggingFaceServer) -> None:
    """Compile acme/small. acme/served shares its compiled form, which is kept when acme/served is removed."""
    download(managed, "acme/small", compile="true")


def hold(service: Service, path: str) -> FileLock:
    """Lock a snapshot as another process that uses it does."""
    return SnapshotLocks(service.directory / "disk" / "own").hold(Path(path))


@pytest.mark.parametrize("model_id", ["acme_one", "acme/one", "acme%2Fone"])
def test_model_is_found_by_its_id_and_its_name(managed: Service, model_id: str) -> None:
    """An id, a name with a slash, and a name with an escaped slash all refer to the model."""
    download(managed, "acme/one")
    details = managed.http.get(f"/api/models/cache/{model_id}").json()["models"]
    assert [model["model_name"] for model in details] == ["acme/one"]
    assert details[0]["details"]
    plan = remove(managed, model_id, dry_run="true").json()
    assert [model["id"] for model in plan["models"]] == ["acme_one"]
    assert cached_models(managed, "acme/one")
    removed = remove(managed, model_id).json()
    assert [model["id"] for model in removed["models"]] == ["acme_one"]
    assert cached_models(managed, "acme/one") == []
    assert_error(remove(managed, model_id), 404, "not_cached", phrase="one")


def test_id_of_two_models_is_ambiguous(managed: Service, hub: HuggingFaceServer) -> None:
    """`two_of_them` is the id of two/of_them and of two_of/them: the error names both, and nothing is removed."""
    names = ("two/of_them", "two_of/them")
    for number, name in enumerate(names):
        hub.repos[name] = small_repository(40 + number)
        download(managed, name)
    assert_error(remove(managed, "two_of_them"), 400, "ambiguous_name", phrase=", ".join(names))
    for name in names:
        assert [model["model_name"] for model in remove(managed, name).json()["models"]] == [name]


def test_verify_finds_a_changed_byte(managed: Service) -> None:
    """All files are hashed, so that a file of the same size with another byte is found."""
    path = Path(download(managed, "acme/damaged")["path"])
    verify = "/api/models/cache/acme/damaged/verify"
    assert managed.http.post(verify).json()["ok"] is True
    weights = (path / "model.safetensors").resolve()
    body = bytearray(weights.read_bytes())
    body[1000] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(body)
    result = managed.http.post(verify).json()
    assert result["ok"] is False
    assert result["models"][0]["findings"] == [{"path": "model.safetensors", "problem": "bytes"}]


@pytest.mark.usefixtures("small_model")
def test_model_in_use_is_removed_only_with_unload(managed: Service) -> None:
    """A loaded model is not removed, and the error names its alias; with `unload` it is unloaded and removed."""
    assert load(managed, "acme/served", alias="busy").status_code == 200
    (before,) = cached_models(managed, "acme/served")
    assert (before["in_use"], before["served_as"]) == (True, ["busy"])
    for parameters in ({}, {"dry_run": "true"}):
        response = remove(managed, "acme_served", **parameters)
        assert_error(response, 409, "model_in_use", phrase="`busy`")
        assert "unload=true" in response.json()["error"]["message"]
    assert managed.embed("hello", model="busy").status_code == 200
    assert Path(before["path"]).is_dir()
    plan = remove(managed, "acme_served", unload="true", dry_run="true").json()
    assert (plan["dry_run"], plan["unloaded"]) == (True, ["busy"])
    assert served_models(managed)["busy"]["state"] == "ready"

    removed = remove(managed, "acme_served", unload="true").json()
    assert (removed["unloaded"], removed["kept"]) == (["busy"], [])
    assert plan["freed"] == removed["freed"] >= before["files_size"]
    assert "busy" not in served_models(managed)
    assert not Path(before["path"]).exists()


@pytest.mark.usefixtures("small_model")
def test_model_is_served_again_if_another_process_uses_it(managed: Service) -> None:
    """If a model was unloaded and cannot be removed, it is served as before."""
    assert load(managed, "acme/served", alias="busy").status_code == 200
    (before,) = cached_models(managed, "acme/served")
    with hold(managed, before["path"]):
        response = remove(managed, "acme_served", unload="true")
        assert_error(response, 409, "model_in_use", phrase="unloaded `busy`")
    assert served_models(managed)["busy"]["state"] == "unloaded"
    assert managed.embed("hello", model="busy").status_code == 200
    assert remove(managed, "acme_served", unload="true").status_code == 200


@pytest.mark.usefixtures("small_model")
def test_removal_waits_for_a_model_in_use(managed: Service) -> None:
    """With `wait_s`, a model that is in use is removed as soon as it is not."""
    assert load(managed, "acme/served", alias="leaving").status_code == 200
    assert_error(remove(managed, "acme/served", wait_s="0.1"), 409, "model_in_use")
    with ThreadPoolExecutor(1) as threads:
        removal = threads.submit(remove, managed, "acme/served", wait_s="300")
        time.sleep(0.5)
        assert not removal.done()
        unload(managed, "leaving", forget="true")
        assert [model["model_name"] for model in removal.result().json()["models"]] == ["acme/served"]
    assert cached_models(managed, "acme/served") == []


def test_one_revision_is_removed(managed: Service, hub: HuggingFaceServer) -> None:
    """If a model is on disk at two revisions, only the requested one is removed."""
    first = download(managed, "acme/old", revision=hub.commit("acme/old"))
    hub.repos["acme/old"]["config.json"] += b" "
    second = download(managed, "acme/old")
    assert first["revision"] != second["revision"]
    removed = remove(managed, "acme/old", revision=first["revision"]).json()
    assert [model["revision"] for model in removed["models"]] == [first["revision"]]
    assert [model["revision"] for model in cached_models(managed, "acme/old")] == [second["revision"]]


@pytest.mark.usefixtures("small_model")
def test_remove_all_keeps_models_in_use(managed: Service) -> None:
    """`all` removes models that are not in use, and lists the others with the reason; with `unload` also those."""
    two = download(managed, "acme/two")
    load(managed, "acme/small", alias="kept")
    with hold(managed, two["path"]):
        plan = remove(managed, "all", unload="true", dry_run="true").json()
    assert plan["unloaded"] == ["kept"]
    assert "acme/small" in [model["model_name"] for model in plan["models"]]
    assert [model["model_name"] for model in plan["kept"]] == ["acme/two"]
    removed = remove(managed, "all").json()
    assert "acme/two" in [model["model_name"] for model in removed["models"]]
    kept = [(model["model_name"], model["served_as"]) for model in removed["kept"]]
    assert kept == [("acme/small", ["kept"])]
    assert removed["kept"][0]["reason"]
    remaining = managed.http.get("/api/models/cache/list").json()
    assert [model["model_name"] for model in remaining["models"]] == ["acme/small"]
    assert remaining["total_size"] >= remaining["models"][0]["size"] > 0

    with hold(managed, remaining["models"][0]["path"]):
        removed = remove(managed, "all", unload="true").json()
    assert (removed["unloaded"], len(removed["kept"])) == (["kept"], 1)
    assert managed.embed("hello", model="kept").status_code == 200

    artifacts = [artifact["key"] for artifact in remaining["models"][0]["artifacts"]]
    removed = remove(managed, "all", unload="true").json()
    assert (removed["unloaded"], removed["kept"]) == (["kept"], [])
    assert removed["artifacts"] == artifacts != []
    assert managed.http.get("/api/models/cache/list").json() == {"models": [], "total_size": 0}


@pytest.mark.parametrize("model_id", ["nope", "../../etc", "..%2f..%2fetc", "acme", "/etc", "%00", "a" * 5000, "列"])
def test_unknown_names_refer_to_nothing_on_disk(managed: Service, model_id: str) -> None:
    """A name is only compared with the listed models, so that it cannot refer to other files."""
    for method, suffix in (("GET", ""), ("POST", "/verify"), ("DELETE", "")):
        response = managed.http.request(method, f"/api/models/cache/{model_id}{suffix}")
        assert response.status_code == 404, response.text
        assert response.json()["error"]["code"] in ("not_cached", "unknown_url")


def test_error_of_the_file_system_is_returned(managed: Service) -> None:
    """If files cannot be removed, the response has the reason, because the caller can do something about it."""
    download(managed, "acme/damaged")
    # A directory in place of the lock file cannot be locked.
    lock = ManifestKey("huggingface", "acme/damaged").lock_path(managed.directory / "disk" / "own" / "snapshots")
    lock.unlink(missing_ok=True)
    lock.mkdir()
    try:
        response = remove(managed, "acme/damaged")
    finally:
        lock.rmdir()
    assert_error(response, 500, "cache_not_writable", phrase="cannot be changed", type="server_error")
    assert cached_models(managed, "acme/damaged")


def test_verification_does_not_block_other_requests(managed: Service, hub: HuggingFaceServer) -> None:
    """While several verifications are reading, models can be listed."""
    hub.repos["acme/long"] = {**small_repository(77), "notes.txt": b""}
    pipe = replace_with_pipe(download(managed, "acme/long"))
    with ThreadPoolExecutor(5) as threads:
        checks = [
            threads.submit(managed.http.post, "/api/models/cache/acme/long/verify") for _ in range(5)
        ]  # fmt: skip
        with blocked_reader(pipe):
            time.sleep(0.3)
            listed = managed.http.get("/api/models/cache/list", timeout=60.0).json()
            assert "acme/long" in [model["model_name"] for model in listed["models"]]
            assert not any(check.done() for check in checks)
        assert all(check.result().json()["ok"] for check in checks)


@pytest.mark.parametrize(("method", "path"), [("DELETE", "list"), ("GET", "all"), ("POST", "all/verify")])
def test_list_and_all_are_not_ids(managed: Service, method: str, path: str) -> None:
    """`list` and `all` accept only one method each."""
    response = managed.http.request(method, f"/api/models/cache/{path}")
    assert_error(response, 405, "method_not_allowed")


def test_misspelled_parameter_removes_nothing(managed: Service) -> None:
    """An unknown parameter is an error, because `dryrun=true` would otherwise remove all models."""
    response = managed.http.delete("/api/models/cache/all?dryrun=true")
    assert_error(response, 400, "unknown_parameter", param="dryrun")
