"""Models are loaded and unloaded over HTTP, and what a request can name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.api.routes.loaded_models import resolve_requested_model
from emb_model_provider.api.schemas.management import LoadQuery
from emb_model_provider.errors import NotAllowedError
from emb_model_provider.settings import MappingEntry, Settings, TrustSettings
from tests.api.helpers import (
    KEYS,
    SECRETS,
    cached_models,
    download,
    get_job,
    load,
    remove,
    served_models,
    small_repository,
    start_download,
    unload,
    wait_for_end,
)
from tests.service import BUNDLED, Service, assert_error, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hubs.servers import HuggingFaceServer


@pytest.mark.slow
def test_added_model_is_served_until_it_is_forgotten(managed: Service, small_hub: HuggingFaceServer) -> None:
    """A model that is not in the settings is compiled, loaded, unloaded, loaded by a request, and forgotten."""
    job = download(managed, "acme/small", compile="true")
    assert (job["model_name"], job["compile"], job["precision"]) == ("acme/small", True, "fp32")
    (model,) = cached_models(managed, "acme/small")
    (artifact,) = model["artifacts"]
    assert artifact["fidelity"]["min_cosine"] > 0.999
    assert model["size"] == model["files_size"] + artifact["size"]

    loaded = load(managed, "acme/small", alias="mine").json()
    assert (loaded["alias"], loaded["model_name"], loaded["state"]) == ("mine", "acme/small", "ready")
    assert (loaded["configured"], loaded["revision"]) == (False, small_hub.commit("acme/small"))
    vector = managed.embed("hello", model="mine").json()["data"]
    status = served_models(managed)["mine"]
    assert (status["requests_served"], status["fidelity"]) == (1, artifact["fidelity"])
    assert status["memory_bytes"] > 0

    unloaded = unload(managed, "mine").json()
    assert (unloaded["state"], served_models(managed)["mine"]["state"]) == ("unloaded", "unloaded")
    assert managed.embed("hello", model="mine").json()["data"] == vector
    assert served_models(managed)["mine"]["state"] == "ready"

    assert unload(managed, "mine", forget="true").status_code == 200
    assert "mine" not in served_models(managed)
    assert_error(managed.embed("hello", model="mine"), 404, "model_not_found", param="model")


@pytest.mark.usefixtures("small_hub")
def test_load_without_waiting(managed: Service) -> None:
    """With `wait=false` the response comes during the load, and another request waits for the same load."""
    response = load(managed, "acme/small", alias="later", wait="false")
    assert response.status_code == 202
    assert response.json()["alias"] == "later"
    assert load(managed, "later").json()["state"] == "ready"
    unload(managed, "later", forget="true")


def test_model_that_cannot_be_loaded_is_not_served(managed: Service) -> None:
    """A load that fails returns the reason with its code, and the model is not added."""
    response = load(managed, "acme/nowhere")
    assert_error(response, 404, "repository_not_found", phrase="acme/nowhere")
    assert "acme/nowhere" not in served_models(managed)


@pytest.mark.usefixtures("small_hub")
def test_alias_of_another_model_is_rejected(managed: Service) -> None:
    """A name that requests use for a model cannot become the alias of another one."""
    before = served_models(managed)
    for name in ("mini", BUNDLED, BUNDLED.partition("/")[2]):
        response = load(managed, "acme/small", alias=name)
        assert_error(response, 409, "alias_in_use", phrase=f"`{name}` means {BUNDLED}")
        assert "`alias`" in response.json()["error"]["message"]
    assert served_models(managed) == before


def test_served_model_is_found_by_equivalent_queries(managed: Service, small_hub: HuggingFaceServer) -> None:
    """A query that describes a served model loads that model instead of adding another one."""
    load(managed, "acme/small")
    before = set(served_models(managed))
    for conditions in ({}, {"source": "huggingface"}, {"precision": "fp32"}, {"alias": "acme/small"}):
        assert load(managed, "acme/small", **conditions).json()["alias"] == "acme/small"
    assert load(managed, "small").json()["alias"] == "acme/small"
    assert set(served_models(managed)) == before
    other_revision = load(managed, "acme/small", revision=small_hub.commit("acme/small"))
    assert_error(other_revision, 409, "alias_in_use")
    unload(managed, "acme/small", forget="true")


def test_model_on_disk_is_served_by_its_id(managed: Service, small_hub: HuggingFaceServer) -> None:
    """Also while it is not loaded, it is listed. It is gone as soon as it is removed, and is not downloaded again."""
    small_hub.repos["acme/pulled"] = small_hub.repos["acme/small"]
    assert_error(managed.embed("hello", model="acme/pulled"), 404, "model_not_found", param="model")
    download(managed, "acme/pulled")
    assert "acme/pulled" not in served_models(managed)
    listed = {model["id"]: model for model in managed.http.get("/v1/models").json()["data"]}
    assert (listed["acme/pulled"]["state"], listed["acme/pulled"]["source"]) == ("unloaded", "huggingface")
    assert "acme/pulled" in {model["name"] for model in managed.http.get("/api/tags").json()["models"]}
    assert managed.http.get("/v1/models/acme/pulled").json()["revision"] == small_hub.commit("acme/pulled")
    assert managed.http.post("/api/show", json={"model": "acme/pulled"}).status_code == 200
    assert "acme/pulled" not in served_models(managed)
    wait_until(lambda: managed.embed("hello", model="acme/pulled").status_code == 200, 560)
    assert served_models(managed)["acme/pulled"]["state"] == "ready"
    assert_error(remove(managed, "acme_pulled"), 409, "model_in_use")
    assert remove(managed, "acme_pulled", unload="true").status_code == 200
    small_hub.forget()
    assert_error(managed.embed("hello", model="acme/pulled"), 404, "model_not_found", param="model")
    assert small_hub.requests == []


@pytest.mark.slow
def test_kept_model_is_recorded_until_it_is_forgotten(managed: Service, small_hub: HuggingFaceServer) -> None:
    """In the cache directory, with everything that its next load needs."""
    record = managed.directory / "disk" / "own" / "kept-models.json"
    assert load(managed, "acme/small", alias="mine").json()["kept"] is False
    assert not record.exists()
    kept = load(managed, "mine", keep="true").json()
    assert (kept["kept"], kept["configured"]) == (True, False)
    assert json.loads(record.read_text())["models"] == [
        {"alias": "mine", "model_name": "acme/small", "source": "auto", "revision": None, "precision": "fp32"}
    ]
    assert unload(managed, "mine").json()["kept"] is True
    assert unload(managed, "mine", forget="true").json()["kept"] is False
    assert not record.exists()
    assert load(managed, "mini", keep="true").json()["kept"] is False  # a model of the settings is always served


def test_error_says_that_a_model_is_being_downloaded(managed: Service, hub: HuggingFaceServer) -> None:
    """With its progress, and when to try again."""
    hub.repos["acme/slow"] = small_repository(7)
    with hub.faults.holding("model.safetensors", 100_000):
        job = start_download(managed, "acme/slow")
        wait_until(lambda: get_job(managed, job)["phase"] == "download")
        error = managed.embed("hello", model="acme/slow")
        assert_error(
            error, 503, "model_not_ready", param="model", type="server_error", phrase="is being downloaded: download"
        )
        assert int(error.headers["retry-after"]) >= 1
        managed.http.delete(job["url"])
    wait_for_end(managed, job)


def test_configured_model_cannot_be_forgotten(managed: Service) -> None:
    """A model of the settings can only be unloaded."""
    response = unload(managed, "mini", forget="true")
    assert_error(response, 403, "not_allowed")
    assert "mini" in served_models(managed)


def test_unload_of_an_unknown_model(managed: Service) -> None:
    """The error names the served models."""
    assert_error(unload(managed, "nope"), 404, "model_not_found", param="model", phrase="mini")


def test_list_includes_the_process(managed: Service) -> None:
    """The list has the memory and the limits of the process."""
    process = managed.http.get("/api/models").json()["process"]
    assert process["pid"] == managed.process.pid
    assert process["resident_bytes"] > 10_000_000
    assert (process["memory_limit_bytes"], process["max_loaded_models"]) == (None, None)


def test_access_to_management_routes(service: Service, guarded: Service, impatient: Service) -> None:
    """Without admin keys, direct local clients have access, with an API key if there are any; with admin keys, their
    owners."""
    assert service.http.get("/api/models").status_code == 200
    proxied = {"x-forwarded-for": "10.0.0.1"}
    assert_error(service.http.get("/api/models", headers=proxied), 403, "admin_only")
    assert guarded.http.get("/api/models/cache/list").status_code == 200
    no_key: dict[str, Any] = {"authorization": ""}
    assert_error(guarded.http.get("/api/models/cache/list", headers=no_key), 401, "invalid_api_key")
    assert_error(impatient.http.post("/api/models/download?model_name=a/b"), 401, "invalid_api_key")
    admin = {"authorization": f"Bearer {SECRETS['admin']}", **proxied}
    assert impatient.http.get("/api/models/jobs", headers=admin).json() == {"jobs": []}
    assert KEYS[0] not in guarded.http.get("/api/models").text
    text = impatient.http.get("/api/models", headers=admin).text
    assert not [secret for secret in SECRETS.values() if secret in text]


# --- which models a request can name ------------------------------------------------------------------


def trusting_settings(**mapping: MappingEntry) -> Settings:
    return Settings.from_values(model_mapping=mapping, trust_remote_code=True, modelscope_trust_remote_code=True)


def test_directory_must_be_in_the_settings(tmp_path: Path) -> None:
    """A directory can be loaded under its alias, with any options, and not by its path."""
    configured, other = tmp_path / "configured", tmp_path / "other"
    configured.mkdir()
    other.mkdir()
    settings = trusting_settings(ours=MappingEntry(name="ours", path=configured))
    spec = resolve_requested_model(settings, LoadQuery(model_name="ours", precision="int8"), "x")
    assert spec.path == configured
    for name in (str(other), f"{configured}/../other", "/nowhere/at/all"):
        with pytest.raises(NotAllowedError):
            resolve_requested_model(settings, LoadQuery(model_name=name))


@pytest.mark.parametrize(
    "query",
    [
        LoadQuery(model_name="a/unknown"),
        LoadQuery(model_name="damo/unknown"),
        LoadQuery(model_name="a/b", revision="another-branch"),
        LoadQuery(model_name="a/b", source="modelscope"),
    ],
    ids=str,
)
def test_code_of_other_repositories_is_not_trusted(query: LoadQuery) -> None:
    """The trust of the settings does not apply to repositories, revisions and hubs that they do not name."""
    spec = resolve_requested_model(trusting_settings(b=MappingEntry(name="a/b")), query)
    trust = TrustSettings(modelscope_trust_remote_code=True, trust_remote_code=True)
    assert not trust.allows(spec, "huggingface")


def test_trust_of_configured_models_is_kept() -> None:
    """A model of the settings is trusted as they say, also under another alias or precision."""
    settings = trusting_settings(b=MappingEntry(name="a/b", trust_remote_code=True), c=MappingEntry(name="a/c"))
    trusted = resolve_requested_model(settings, LoadQuery(model_name="b", precision="fp32"), "other")
    assert trusted.trust_remote_code is True
    default = resolve_requested_model(settings, LoadQuery(model_name="a/c"))
    assert default.trust_remote_code is None
