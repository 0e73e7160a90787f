"""Models loaded, unloaded, looked at and removed over HTTP. The real service, a real small model, a hub on this machine."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.snapshots.locks import SnapshotHolds
from emb_model_provider.snapshots.manifest import ManifestKey
from tests.api.managing import any_files, cached, downloaded, files_in, served, unreadable, written
from tests.api.models import KEYS, SECRETS
from tests.hubs.servers import HuggingFaceServer
from tests.models import FAMILIES
from tests.service import BUNDLED, Service, assert_error

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

SMALL = ["acme/small", "acme/served"]
PLAIN = ["acme/one", "acme/two", "acme/damaged", "acme/old", "acme/new"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HuggingFaceServer]:
    """Yield a hub with repositories that can be loaded, and others that can only be kept."""
    small = files_in(FAMILIES["bert-mean-normalize"](tmp_path_factory.mktemp("small") / "model"))
    # They are the same files: what was compiled from one serves the other, and compiling takes a while.
    repos = dict.fromkeys(SMALL, small) | {name: any_files(i) for i, name in enumerate(PLAIN)}
    with HuggingFaceServer(repos) as server:
        yield server


@pytest.fixture(scope="module")
def managed(tmp_path_factory: pytest.TempPathFactory, hub: HuggingFaceServer) -> Iterator[Service]:
    """Yield a service that loads nothing at its start."""
    directory = tmp_path_factory.mktemp("managed")
    settings = {
        "MODEL_MAPPING": json.dumps({"mini": {"name": BUNDLED}}),
        "PRELOAD_MODELS": "none",
        "MODEL_PRECISION": "fp32",
        "HF_ENDPOINT": hub.url,
        "HF_CACHE_DIR": str(directory / "hf"),
        "CACHE_DIR": str(directory / "own"),
    }
    with Service(directory, **settings) as started:
        yield started.wait()


def load(service: Service, name: str, **parameters: str) -> httpx.Response:
    return service.http.post("/api/models/load", params={"model_name": name, **parameters})


def unload(service: Service, name: str, **parameters: str) -> httpx.Response:
    return service.http.post("/api/models/unload", params={"model_name": name, **parameters})


def remove(service: Service, model_id: str, **parameters: str) -> httpx.Response:
    return service.http.delete(f"/api/models/cache/{model_id}", params=parameters)


# --- in memory ------------------------------------------------------------------------------------------


def test_model_comes_serves_and_goes(managed: Service, hub: HuggingFaceServer) -> None:
    """A model that no setting names is compiled ahead, loaded, embeds, is unloaded, loaded by a request, and forgotten."""
    job = downloaded(managed, "acme/small", compile="true")
    assert (job["model_name"], job["compile"], job["precision"]) == ("acme/small", True, "fp32")
    (model,) = cached(managed, "acme/small")
    (artifact,) = model["artifacts"]
    assert artifact["fidelity"]["min_cosine"] > 0.999
    assert model["size"] == model["files_size"] + artifact["size"]

    loaded = load(managed, "acme/small", alias="small").json()
    assert (loaded["alias"], loaded["model_name"], loaded["state"]) == ("small", "acme/small", "ready")
    assert (loaded["configured"], loaded["revision"]) == (False, hub.commit("acme/small"))
    vector = managed.embed("hello", model="small").json()["data"]
    status = served(managed)["small"]
    assert (status["requests_served"], status["fidelity"]) == (1, artifact["fidelity"])
    assert status["memory_bytes"] > 0

    unloaded = unload(managed, "small").json()
    assert (unloaded["state"], served(managed)["small"]["state"]) == ("unloaded", "unloaded")
    assert managed.embed("hello", model="small").json()["data"] == vector
    assert served(managed)["small"]["state"] == "ready"

    assert unload(managed, "small", forget="true").status_code == 200
    assert "small" not in served(managed)
    assert_error(managed.embed("hello", model="small"), 404, "model_not_found", param="model")


def test_load_without_waiting(managed: Service) -> None:
    """With `wait=false` the answer comes while it loads; asking once more waits for the same load."""
    response = load(managed, "acme/small", alias="later", wait="false")
    assert response.status_code == 202
    assert response.json()["alias"] == "later"
    assert load(managed, "later").json()["state"] == "ready"
    unload(managed, "later", forget="true")


def test_model_that_cannot_be_loaded_is_not_served(managed: Service) -> None:
    """A load that fails says why with a code of its own, and leaves no model behind that nobody can use."""
    response = load(managed, "acme/nowhere")
    assert_error(response, 404, "repository_not_found", phrase="acme/nowhere")
    assert "acme/nowhere" not in served(managed)


def test_alias_means_one_model(managed: Service) -> None:
    """A name that requests use for a model is not given to another one; the refusal says what to do."""
    before = served(managed)["mini"]
    for name in ("mini", BUNDLED, BUNDLED.partition("/")[2]):
        response = load(managed, "acme/small", alias=name)
        assert_error(response, 409, "alias_in_use", phrase=f"`{name}` means {BUNDLED}")
        assert "alias=" in response.json()["error"]["message"]
    assert list(served(managed).values()) == [before]


def test_model_that_is_served_is_found_however_it_is_named(managed: Service, hub: HuggingFaceServer) -> None:
    """What the caller adds to a name may be what is served already: then that is loaded, and nothing else is served."""
    load(managed, "acme/small")
    before = set(served(managed))
    for more in ({}, {"source": "huggingface"}, {"precision": "fp32"}, {"alias": "acme/small"}):
        assert load(managed, "acme/small", **more).json()["alias"] == "acme/small"
    assert load(managed, "small").json()["alias"] == "acme/small"
    assert set(served(managed)) == before
    assert_error(load(managed, "acme/small", revision=hub.commit("acme/small")), 409, "alias_in_use")
    unload(managed, "acme/small", forget="true")


def test_models_of_the_settings_stay(managed: Service) -> None:
    """What the settings name can be unloaded, and not forgotten."""
    response = unload(managed, "mini", forget="true")
    assert_error(response, 403, "not_allowed")
    assert "mini" in served(managed)


def test_unknown_model_is_not_unloaded(managed: Service) -> None:
    """Unloading a name that nothing has says what there is."""
    assert_error(unload(managed, "nope"), 404, "model_not_found", param="model", phrase="mini")


def test_process_tells_what_it_takes(managed: Service) -> None:
    """The list comes with the process's own figures."""
    process = managed.http.get("/api/models").json()["process"]
    assert process["pid"] == managed.process.pid
    assert process["resident_bytes"] > 10_000_000
    assert (process["memory_limit_bytes"], process["max_loaded_models"]) == (None, None)


# --- on disk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_id", ["acme_one", "acme/one", "acme%2Fone"])
def test_model_goes_by_its_name_or_its_id(managed: Service, model_id: str) -> None:
    """An id of the list, a plain name, and a name with its slash escaped all mean the model."""
    downloaded(managed, "acme/one")
    details = managed.http.get(f"/api/models/cache/{model_id}").json()["models"]
    assert [model["model_name"] for model in details] == ["acme/one"]
    assert details[0]["details"]
    assert [model["id"] for model in remove(managed, model_id, dry_run="true").json()["models"]] == [
        "acme_one"
    ]
    assert cached(managed, "acme/one")
    removed = remove(managed, model_id).json()
    assert [model["id"] for model in removed["models"]] == ["acme_one"]
    assert cached(managed, "acme/one") == []
    assert_error(remove(managed, model_id), 404, "not_cached", phrase="one")


def test_id_of_two_models_means_neither(managed: Service, hub: HuggingFaceServer) -> None:
    """`two_of_them` can be two/of_them and two_of/them: both are named, and nothing is removed."""
    names = ("two/of_them", "two_of/them")
    for number, name in enumerate(names):
        hub.repos[name] = any_files(40 + number)
        downloaded(managed, name)
    refused = remove(managed, "two_of_them")
    assert_error(refused, 400, "ambiguous_name", phrase=", ".join(names))
    for name in names:
        assert [model["model_name"] for model in remove(managed, name).json()["models"]] == [name]


def test_verify_finds_a_byte_that_changed(managed: Service) -> None:
    """All bytes are read: a file of the same size with another byte is found, and named."""
    path = Path(downloaded(managed, "acme/damaged")["path"])
    verify = "/api/models/cache/acme/damaged/verify"
    assert managed.http.post(verify).json()["ok"] is True
    weights = (path / "model.safetensors").resolve()
    body = bytearray(weights.read_bytes())
    body[1000] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(body)
    answer = managed.http.post(verify).json()
    assert answer["ok"] is False
    assert answer["models"][0]["findings"] == [{"path": "model.safetensors", "problem": "bytes"}]


def test_model_in_use_is_not_removed(managed: Service) -> None:
    """A loaded model's files stay, and the refusal says which alias has them; with `unload` they go."""
    assert load(managed, "acme/served", alias="busy").status_code == 200
    (before,) = cached(managed, "acme/served")
    assert (before["in_use"], before["served_as"]) == (True, ["busy"])
    response = remove(managed, "acme_served")
    assert_error(response, 409, "model_in_use", phrase="`busy`")
    assert managed.embed("hello", model="busy").status_code == 200
    assert Path(before["path"]).is_dir()
    plan = remove(managed, "acme_served", unload="true", dry_run="true").json()
    assert (plan["dry_run"], plan["unloaded"]) == (True, ["busy"])
    assert served(managed)["busy"]["state"] == "ready"

    # A program beside the service has it, too: what was unloaded for nothing is served as before.
    with SnapshotHolds(managed.directory / "own").hold(Path(before["path"])):
        response = remove(managed, "acme_served", unload="true")
        assert_error(response, 409, "model_in_use", phrase="`busy` was unloaded for it")
    assert served(managed)["busy"]["state"] == "unloaded"
    assert managed.embed("hello", model="busy").status_code == 200

    removed = remove(managed, "acme_served", unload="true").json()
    assert (removed["unloaded"], removed["kept"]) == (["busy"], [])
    assert plan["freed"] == removed["freed"] >= before["files_size"]
    assert "busy" not in served(managed)
    assert not Path(before["path"]).exists()


def test_removal_waits_as_long_as_it_is_told_to(managed: Service) -> None:
    """With `wait_s` a model that is in use is removed when it is not any more."""
    assert load(managed, "acme/served", alias="leaving").status_code == 200
    assert_error(remove(managed, "acme/served", wait_s="0.1"), 409, "model_in_use")
    with ThreadPoolExecutor(1) as threads:
        removal = threads.submit(remove, managed, "acme/served", wait_s="300")
        time.sleep(0.5)
        assert not removal.done()
        unload(managed, "leaving", forget="true")
        assert [model["model_name"] for model in removal.result().json()["models"]] == ["acme/served"]
    assert cached(managed, "acme/served") == []


def test_revision_narrows_what_is_meant(managed: Service, hub: HuggingFaceServer) -> None:
    """Of a model that is here at two revisions, the one that is asked for goes, and the other stays."""
    first = downloaded(managed, "acme/old", revision=hub.commit("acme/old"))
    hub.repos["acme/old"]["config.json"] += b" "
    second = downloaded(managed, "acme/old")
    assert first["revision"] != second["revision"]
    removed = remove(managed, "acme/old", revision=first["revision"]).json()
    assert [model["revision"] for model in removed["models"]] == [first["revision"]]
    assert [model["revision"] for model in cached(managed, "acme/old")] == [second["revision"]]


def test_everything_is_removed_but_what_is_in_use(managed: Service) -> None:
    """`all` takes what nobody uses, and tells what it keeps and why."""
    two = downloaded(managed, "acme/two")
    load(managed, "acme/small", alias="kept")
    with SnapshotHolds(managed.directory / "own").hold(Path(two["path"])):
        plan = remove(managed, "all", unload="true", dry_run="true").json()
    assert plan["unloaded"] == ["kept"]
    assert "acme/small" in [model["model_name"] for model in plan["models"]]
    assert [model["model_name"] for model in plan["kept"]] == ["acme/two"]
    removed = managed.http.delete("/api/models/cache/all").json()
    assert "acme/two" in [model["model_name"] for model in removed["models"]]
    assert [(model["model_name"], model["served_as"]) for model in removed["kept"]] == [
        ("acme/small", ["kept"])
    ]
    assert removed["kept"][0]["reason"]
    left = managed.http.get("/api/models/cache/list").json()
    assert [model["model_name"] for model in left["models"]] == ["acme/small"]
    assert left["total_size"] >= left["models"][0]["size"] > 0

    with SnapshotHolds(managed.directory / "own").hold(Path(left["models"][0]["path"])):
        removed = managed.http.delete("/api/models/cache/all", params={"unload": "true"}).json()
    assert (removed["unloaded"], len(removed["kept"])) == (["kept"], 1)
    assert managed.embed("hello", model="kept").status_code == 200

    artifacts = [artifact["key"] for artifact in left["models"][0]["artifacts"]]
    removed = managed.http.delete("/api/models/cache/all", params={"unload": "true"}).json()
    assert (removed["unloaded"], removed["kept"]) == (["kept"], [])
    assert removed["artifacts"] == artifacts != []
    assert managed.http.get("/api/models/cache/list").json() == {"models": [], "total_size": 0}


@pytest.mark.parametrize(
    "model_id", ["nope", "../../etc", "..%2f..%2fetc", "acme", "/etc", "%00", "a" * 5000, "列"]
)
def test_other_names_mean_nothing_on_disk(managed: Service, model_id: str) -> None:
    """A name is only compared with what is listed: nothing else on the disk can be meant."""
    for method, suffix in (("GET", ""), ("POST", "/verify"), ("DELETE", "")):
        response = managed.http.request(method, f"/api/models/cache/{model_id}{suffix}")
        assert response.status_code == 404, response.text
        assert response.json()["error"]["code"] in ("not_cached", "unknown_url")


def test_disk_that_refuses_a_removal_is_told_of(managed: Service) -> None:
    """What the system said of it is the answer: who removes models can do something about it."""
    downloaded(managed, "acme/damaged")
    # Where the lock of a repository is to be, nothing can be locked.
    lock = ManifestKey("huggingface", "acme/damaged").lock_path(managed.directory / "own" / "snapshots")
    lock.mkdir()
    try:
        response = remove(managed, "acme/damaged")
    finally:
        lock.rmdir()
    assert_error(response, 500, "cache_not_writable", phrase="cannot be changed", type="server_error")
    assert cached(managed, "acme/damaged")


def test_reading_models_to_check_them_holds_nobody_up(managed: Service, hub: HuggingFaceServer) -> None:
    """However many are checked at a time, and however long that takes, others list the models meanwhile."""
    hub.repos["acme/long"] = {**any_files(77), "notes.txt": b""}
    pipe = unreadable(downloaded(managed, "acme/long"))
    with ThreadPoolExecutor(5) as threads:
        checks = [
            threads.submit(managed.http.post, "/api/models/cache/acme/long/verify") for _ in range(5)
        ]  # fmt: skip
        with written(pipe):
            time.sleep(0.3)
            listed = managed.http.get("/api/models/cache/list", timeout=60.0).json()
            assert "acme/long" in [model["model_name"] for model in listed["models"]]
            assert not any(check.done() for check in checks)
        assert all(check.result().json()["ok"] for check in checks)


def test_words_in_place_of_an_id(managed: Service) -> None:
    """`list` and `all` are no ids: asked for in another way, they do nothing."""
    for method, path in (("DELETE", "list"), ("GET", "all"), ("POST", "all/verify")):
        response = managed.http.request(method, f"/api/models/cache/{path}")
        assert_error(response, 405, "method_not_allowed")
    assert_error(
        managed.http.delete("/api/models/cache/all?dryrun=true"), 400, "unknown_parameter", param="dryrun"
    )


# --- the door -------------------------------------------------------------------------------------------


def test_who_may_manage(service: Service, guarded: Service, edge: Service) -> None:
    """Without admin keys a direct local caller with a key, if keys there are; with admin keys who has one of those."""
    assert service.http.get("/api/models").status_code == 200
    proxied = {"x-forwarded-for": "10.0.0.1"}
    assert_error(service.http.get("/api/models", headers=proxied), 403, "admin_only")
    assert guarded.http.get("/api/models/cache/list").status_code == 200
    no_key: dict[str, Any] = {"authorization": ""}
    assert_error(guarded.http.get("/api/models/cache/list", headers=no_key), 401, "invalid_api_key")
    assert_error(edge.http.post("/api/models/download?model_name=a/b"), 401, "invalid_api_key")
    good = {"authorization": f"Bearer {SECRETS['admin']}", **proxied}
    assert edge.http.get("/api/models/jobs", headers=good).json() == {"jobs": []}
    assert KEYS[0] not in guarded.http.get("/api/models").text
    told = edge.http.get("/api/models", headers=good).text
    assert not [secret for secret in SECRETS.values() if secret in told]
