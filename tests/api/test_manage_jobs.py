"""Downloads over HTTP: jobs that are started, watched and cancelled. The real service, a hub on this machine."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.api.managing import (
    any_files,
    cached,
    download,
    downloaded,
    ended,
    everything_in,
    look,
    served,
    unreadable,
    written,
)
from tests.hubs.servers import HuggingFaceServer, ModelScopeServer
from tests.service import Service, assert_error, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

HF = [f"acme/{name}" for name in ("plain", "force", "twice", "held", "other", "base")]
MS = "iic/tiny"


@pytest.fixture(scope="module")
def hub() -> Iterator[HuggingFaceServer]:
    with HuggingFaceServer({name: any_files(seed) for seed, name in enumerate(HF)}) as server:
        yield server


@pytest.fixture(scope="module")
def modelscope() -> Iterator[ModelScopeServer]:
    with ModelScopeServer({MS: any_files(99)}) as server:
        yield server


@pytest.fixture(scope="module")
def managed(
    tmp_path_factory: pytest.TempPathFactory, hub: HuggingFaceServer, modelscope: ModelScopeServer
) -> Iterator[Service]:
    """Yield a service that has loaded nothing, whose hubs are on this machine."""
    directory = tmp_path_factory.mktemp("jobs")
    with Service(directory, **settings(directory, hub, modelscope)) as started:
        yield started.wait()


def settings(
    directory: Path, hub: HuggingFaceServer, modelscope: ModelScopeServer | None = None
) -> dict[str, str]:
    more = {"MODELSCOPE_ENDPOINT": modelscope.url} if modelscope is not None else {}
    return {
        "PRELOAD_MODELS": "none",
        "HF_ENDPOINT": hub.url,
        "HF_CACHE_DIR": str(directory / "disk" / "hf"),
        "MODELSCOPE_CACHE_DIR": str(directory / "disk" / "ms"),
        "CACHE_DIR": str(directory / "disk" / "own"),
        **more,
    }


@pytest.fixture
def held(hub: HuggingFaceServer) -> Iterator[None]:
    """Have the hub send the beginning of all weights, and the rest when the test lets it."""
    with holding(hub):
        yield


@contextmanager
def holding(hub: HuggingFaceServer) -> Iterator[None]:
    hub.faults.release.clear()
    hub.faults.hold_after["model.safetensors"] = 1000
    try:
        yield
    finally:
        hub.faults.hold_after.clear()
        hub.faults.release.set()


def weights_are_asked_for(hub: HuggingFaceServer, name: str) -> None:
    wait_until(lambda: any(r.method == "GET" and name in r.path and r.path.endswith(".safetensors") for r in list(hub.requests)))  # fmt: skip


def events(service: Service, job: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a job's events until the stream ends."""
    with service.http.stream("GET", f"{job['url']}/events") as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in response.iter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                yield name, json.loads(value)


def test_download_is_a_job_that_ends_with_the_files(managed: Service, hub: HuggingFaceServer) -> None:
    """A download is accepted at once, runs as a job, and leaves a complete model of the hub's bytes."""
    job = downloaded(managed, "acme/plain")
    assert (job["source"], job["asked_revision"], job["error"]) == ("huggingface", None, None)
    assert job["revision"] == hub.commit("acme/plain")
    assert job["created"] <= job["started"] <= job["ended"]
    for name, body in hub.repos["acme/plain"].items():
        assert (Path(job["path"]) / name).read_bytes() == body
    (model,) = cached(managed, "acme/plain")
    assert (model["id"], model["state"], model["path"]) == ("acme_plain", "complete", job["path"])
    assert job["id"] in [each["id"] for each in managed.http.get("/api/models/jobs").json()["jobs"]]


def test_source_is_the_callers_choice(managed: Service) -> None:
    """`source=modelscope` downloads from there, whatever the settings would take."""
    job = downloaded(managed, MS, source="modelscope")
    assert (job["source"], job["revision"]) == ("modelscope", "master")
    assert [model["source"] for model in cached(managed, MS)] == ["modelscope"]


@pytest.mark.usefixtures("held")
def test_two_downloads_of_one_model_are_one_job(managed: Service, hub: HuggingFaceServer) -> None:
    """While a model is downloaded, another wish for it is the same job; its bytes are sent once."""
    first = download(managed, "acme/twice")
    weights_are_asked_for(hub, "acme/twice")
    assert download(managed, "acme/twice")["id"] == first["id"]
    hub.faults.release.set()
    assert ended(managed, first)["state"] == "done"
    assert sum(r.method == "GET" and r.storage and "acme/twice" in r.path for r in hub.requests) == 1
    assert download(managed, "acme/twice")["id"] != first["id"]


def test_force_asks_the_hub_again(managed: Service, hub: HuggingFaceServer) -> None:
    """A model that is here is not asked for; with `force` it is, and what changed there is fetched."""
    before = downloaded(managed, "acme/force")
    hub.repos["acme/force"]["config.json"] = b'{"model_type": "bert", "hidden_size": 77}'
    assert downloaded(managed, "acme/force")["path"] == before["path"]
    after = downloaded(managed, "acme/force", force="true")
    assert after["revision"] == hub.commit("acme/force") != before["revision"]
    assert json.loads((Path(after["path"]) / "config.json").read_bytes())["hidden_size"] == 77


def test_events_tell_a_job_from_its_beginning_to_its_end(
    managed: Service, hub: HuggingFaceServer, held: None
) -> None:
    """The first event comes while nothing moves, the last says how it ended, and then the stream ends."""
    job = download(managed, "acme/other")
    weights_are_asked_for(hub, "acme/other")
    seen = []
    for name, data in events(managed, job):
        seen.append((name, data["state"]))
        assert data["id"] == job["id"]
        hub.faults.release.set()
    assert seen[0] == ("progress", "running")
    assert seen[-1] == ("done", "done")
    assert list(events(managed, job)) == [("done", look(managed, job))]


def test_failed_job_says_why_and_can_be_asked_for_again(managed: Service, hub: HuggingFaceServer) -> None:
    """A repository that is not there fails the job, with the reason; once it is there, the same wish succeeds."""
    failed = ended(managed, download(managed, "acme/late"))
    assert (failed["state"], failed["error_code"]) == ("failed", "repository_not_found")
    assert "acme/late" in failed["error"]
    assert [(name, data["error"]) for name, data in events(managed, failed)] == [("failed", failed["error"])]
    hub.repos["acme/late"] = any_files(50)
    assert downloaded(managed, "acme/late")["id"] != failed["id"]
    assert look(managed, failed)["state"] == "failed"


def test_cancelled_download_leaves_no_litter(managed: Service, hub: HuggingFaceServer) -> None:
    """After a cancel in the middle of a file, the disk is as it was before the download; and it can be asked for again."""
    downloaded(managed, "acme/base")
    before = everything_in(managed.directory / "disk")
    with holding(hub):
        job = download(managed, "acme/held")
        weights_are_asked_for(hub, "acme/held")
        response = managed.http.delete(job["url"])
        assert response.status_code == 200
        assert response.json()["cancelling"] or response.json()["state"] == "cancelled"
    job = ended(managed, job)
    assert (job["state"], job["error"], job["cancelling"]) == ("cancelled", None, False)
    assert everything_in(managed.directory / "disk") == before
    assert managed.http.delete(job["url"]).json() == job
    downloaded(managed, "acme/held")


def test_watcher_that_goes_away_costs_nothing(managed: Service, hub: HuggingFaceServer) -> None:
    """Who stops watching ends the stream, which is logged then, and not the job, nor what others see of it."""
    with holding(hub):
        job = download(managed, add(hub, "acme/watched"))
        weights_are_asked_for(hub, "acme/watched")
        stream = events(managed, job)
        next(stream)
        assert f"{job['url']}/events" not in managed.log_text()
        stream.close()
        wait_until(lambda: f"{job['url']}/events" in managed.log_text())
        assert look(managed, job)["state"] == "running"
    assert ended(managed, job)["state"] == "done"


def add(hub: HuggingFaceServer, name: str) -> str:
    """Give the hub a repository of its own for a test."""
    hub.repos[name] = any_files(len(hub.repos) + 200)
    return name


@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("DELETE", ""), ("GET", "/events")])
def test_job_that_is_not_there(managed: Service, method: str, suffix: str) -> None:
    """Of an unknown job there is nothing to tell, and the list is named."""
    response = managed.http.request(method, f"/api/models/jobs/nope{suffix}")
    assert_error(response, 404, "job_not_found", phrase="GET /api/models/jobs")


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ("", "missing_required_parameter", "model_name"),
        ("model_name=", "invalid_value", "model_name"),
        ("model_name=a/b&source=github", "invalid_value", "source"),
        ("model_name=a/b&force=perhaps", "invalid_type", "force"),
        ("model_name=a/b&precision=fp8", "invalid_value", "precision"),
        ("model_name=a/b&revision=", "invalid_value", "revision"),
        ("model_name=a/b&forced=true", "unknown_parameter", "forced"),
        ("model_name=a%00b", "invalid_value", "model_name"),
    ],
)
def test_bad_parameters_are_named(managed: Service, query: str, code: str, param: str) -> None:
    """A query that is not as described is refused in OpenAI's form, with the parameter at fault."""
    response = managed.http.post(f"/api/models/download?{query}")
    assert_error(response, 400, code, param=param, phrase=param)


@pytest.mark.parametrize("query", ["model_name=/etc", "model_name=.", "model_name=a/b&source=local"])
def test_directories_are_not_named_over_http(managed: Service, query: str) -> None:
    """A caller cannot have a directory of this machine read."""
    response = managed.http.post(f"/api/models/download?{query}")
    assert_error(response, 403, "not_allowed", phrase="EMB_PROVIDER_MODEL_MAPPING")


def test_stop_waits_for_nothing_that_may_take_long(tmp_path: Path, hub: HuggingFaceServer) -> None:
    """A service that is told to end does so in good order though a transfer hangs, is watched and is waited for.

    Who waits for it, to load it or to remove it, hears that the service is shutting down; so does who has files checked,
    after the one that is being read.
    """
    hub.repos["acme/checked"] = {**any_files(60), "notes.txt": b""}
    with Service(tmp_path, **settings(tmp_path, hub)) as stopping, ThreadPoolExecutor(3) as threads:
        stopping.wait()
        pipe = unreadable(downloaded(stopping, "acme/checked"))
        name = add(hub, "acme/hangs")
        with holding(hub):
            job = download(stopping, name)
            weights_are_asked_for(hub, name)
            stream = events(stopping, job)
            assert next(stream)[0] == "progress"
            loading = threads.submit(stopping.http.post, "/api/models/load", params={"model_name": name})
            wait_until(lambda: served(stopping).get(name, {}).get("state") == "downloading")
            removing = threads.submit(stopping.http.delete, f"/api/models/cache/{name}?unload=true")
            wait_until(lambda: name not in served(stopping))
            checking = threads.submit(stopping.http.post, "/api/models/cache/acme/checked/verify")
            with written(pipe):
                stopping.signal()
                answers = [loading.result(), removing.result()]
            for response in (*answers, checking.result()):
                assert_error(
                    response, 503, "model_not_ready", param="model", phrase="shutting down", type="server_error"
                )  # fmt: skip
            assert "done" not in dict(stream)
            assert stopping.ended() == 0
            assert "graceful shutdown exceeded" not in stopping.log_text()
