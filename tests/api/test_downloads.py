"""Downloads over HTTP: they are started, watched and cancelled as jobs."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.api.helpers import (
    blocked_reader,
    cached_models,
    download,
    get_job,
    replace_with_pipe,
    served_models,
    small_repository,
    start_download,
    wait_for_end,
)
from tests.service import Service, assert_error, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer


def add_repository(hub: HuggingFaceServer | ModelScopeServer, name: str) -> str:
    """Add a repository that differs from all others, and return its name."""
    hub.repos[name] = small_repository(len(hub.repos) + 200)
    return name


def wait_for_transfer(hub: HuggingFaceServer, name: str) -> None:
    """Wait until the weights of a repository are requested."""

    def is_requested() -> bool:
        return any(
            request.method == "GET" and name in request.path and request.path.endswith(".safetensors")
            for request in list(hub.requests)
        )

    wait_until(is_requested)


def events(service: Service, job: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the events of a job until the stream ends."""
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


def paths_below(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def test_download_ends_with_the_files(managed: Service, hub: HuggingFaceServer) -> None:
    """A download is accepted at once, runs as a job, and leaves a complete model with the hub's bytes."""
    name = add_repository(hub, "acme/plain")
    job = download(managed, name)
    assert (job["source"], job["asked_revision"], job["error"]) == ("huggingface", None, None)
    assert job["revision"] == hub.commit(name)
    assert job["created"] <= job["started"] <= job["ended"]
    for path, body in hub.repos[name].items():
        assert (Path(job["path"]) / path).read_bytes() == body
    (model,) = cached_models(managed, name)
    assert (model["id"], model["state"], model["path"]) == ("acme_plain", "complete", job["path"])
    assert job["id"] in [each["id"] for each in managed.http.get("/api/models/jobs").json()["jobs"]]


def test_source_selects_the_hub(managed: Service, modelscope: ModelScopeServer) -> None:
    """`source=modelscope` downloads from ModelScope, whatever the settings would choose."""
    name = add_repository(modelscope, "acme/tiny")
    job = download(managed, name, source="modelscope")
    assert (job["source"], job["revision"]) == ("modelscope", "master")
    assert [model["source"] for model in cached_models(managed, name)] == ["modelscope"]


def test_second_download_of_a_model_joins_the_first(managed: Service, hub: HuggingFaceServer) -> None:
    """While a model is downloaded, another download of it is the same job, and its bytes are sent once."""
    name = add_repository(hub, "acme/twice")
    with hub.faults.holding("model.safetensors", 1000):
        first = start_download(managed, name)
        wait_for_transfer(hub, name)
        assert start_download(managed, name)["id"] == first["id"]
    assert wait_for_end(managed, first)["state"] == "done"
    transfers = [r for r in hub.requests if r.method == "GET" and r.storage and name in r.path]
    assert len(transfers) == 1
    assert start_download(managed, name)["id"] != first["id"]


def test_force_asks_the_hub_again(managed: Service, hub: HuggingFaceServer) -> None:
    """The hub is asked about a model on disk only with `force`; then its changes are downloaded."""
    name = add_repository(hub, "acme/force")
    before = download(managed, name)
    hub.repos[name]["config.json"] = b'{"model_type": "bert", "hidden_size": 77}'
    assert download(managed, name)["path"] == before["path"]
    after = download(managed, name, force="true")
    assert after["revision"] == hub.commit(name) != before["revision"]
    assert json.loads((Path(after["path"]) / "config.json").read_bytes())["hidden_size"] == 77


def test_events_of_a_job(managed: Service, hub: HuggingFaceServer) -> None:
    """The first event comes although the transfer is stalled, and the last event has the result."""
    name = add_repository(hub, "acme/other")
    states = []
    with hub.faults.holding("model.safetensors", 1000):
        job = start_download(managed, name)
        wait_for_transfer(hub, name)
        for event, data in events(managed, job):
            states.append((event, data["state"]))
            assert data["id"] == job["id"]
            hub.faults.release.set()
    assert states[0] == ("progress", "running")
    assert states[-1] == ("done", "done")
    assert list(events(managed, job)) == [("done", get_job(managed, job))]


def test_head_of_events_does_not_wait(managed: Service, hub: HuggingFaceServer) -> None:
    """HEAD returns the headers of the stream at once."""
    name = add_repository(hub, "acme/head")
    with hub.faults.holding("model.safetensors", 1000):
        job = start_download(managed, name)
        response = managed.http.head(f"{job['url']}/events", timeout=30)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
    wait_for_end(managed, job)


def test_failed_download_can_be_started_again(managed: Service, hub: HuggingFaceServer) -> None:
    """A download of an unknown repository fails with the reason, and succeeds after the repository was added."""
    failed = wait_for_end(managed, start_download(managed, "acme/missing"))
    assert (failed["state"], failed["error_code"]) == ("failed", "repository_not_found")
    assert "acme/missing" in failed["error"]
    assert [(name, data["error"]) for name, data in events(managed, failed)] == [("failed", failed["error"])]
    add_repository(hub, "acme/missing")
    assert download(managed, "acme/missing")["id"] != failed["id"]
    assert get_job(managed, failed)["state"] == "failed"


def test_cancelled_download_leaves_no_files(managed: Service, hub: HuggingFaceServer) -> None:
    """After a download was cancelled during a transfer, no file of it is left, and it can be started again."""
    disk = managed.directory / "disk"
    download(managed, add_repository(hub, "acme/base"))  # so that all directories exist
    before = paths_below(disk)
    name = add_repository(hub, "acme/held")
    with hub.faults.holding("model.safetensors", 1000):
        job = start_download(managed, name)
        wait_for_transfer(hub, name)
        response = managed.http.delete(job["url"])
        assert response.status_code == 200
        assert response.json()["cancelling"] or response.json()["state"] == "cancelled"
    job = wait_for_end(managed, job)
    assert (job["state"], job["error"], job["cancelling"]) == ("cancelled", None, False)
    left = set(paths_below(disk)) - set(before)
    assert [path for path in left if (disk / path).is_file() and not path.endswith((".lock", ".hold"))] == []
    assert managed.http.delete(job["url"]).json() == job
    download(managed, name)


def test_client_that_stops_watching(managed: Service, hub: HuggingFaceServer) -> None:
    """If a client closes the stream, the request is logged, and the job continues."""
    name = add_repository(hub, "acme/watched")
    with hub.faults.holding("model.safetensors", 1000):
        job = start_download(managed, name)
        wait_for_transfer(hub, name)
        stream = events(managed, job)
        next(stream)
        assert f"{job['url']}/events" not in managed.log_text()
        stream.close()
        wait_until(lambda: f"{job['url']}/events" in managed.log_text())
        assert get_job(managed, job)["state"] == "running"
    assert wait_for_end(managed, job)["state"] == "done"


@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("DELETE", ""), ("GET", "/events")])
def test_unknown_job(managed: Service, method: str, suffix: str) -> None:
    """The error for an unknown job names the route that lists the jobs."""
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
def test_invalid_parameters(managed: Service, query: str, code: str, param: str) -> None:
    """An invalid query gets an error in OpenAI's form that names the parameter."""
    response = managed.http.post(f"/api/models/download?{query}")
    assert_error(response, 400, code, param=param, phrase=param)


def test_parameters_can_be_in_the_body(managed: Service, hub: HuggingFaceServer) -> None:
    """As JSON, or some there and some in the query. A download is compiled unless `compile` is false."""
    name = add_repository(hub, "acme/body")
    job = managed.http.post("/api/models/download?compile=false", json={"model_name": name, "revision": None}).json()
    assert wait_for_end(managed, job)["state"] == "done"
    plan = managed.http.request("DELETE", f"/api/models/cache/{name}", json={"dry_run": True}).json()
    assert (plan["dry_run"], [model["model_name"] for model in plan["models"]]) == (True, [name])
    compiling = managed.http.post("/api/models/download", json={"model_name": name}).json()
    assert compiling["compile"] is True
    wait_for_end(managed, compiling)


@pytest.mark.parametrize(
    ("query", "body", "code", "param"),
    [
        ("", b'["acme/body"]', "invalid_value", None),
        ("", b"model_name=acme/body", "invalid_value", None),
        ("", b"{}", "missing_required_parameter", "model_name"),
        ("", b'{"model_name": "a/b", "forced": true}', "unknown_parameter", "forced"),
        ("", b'{"model_name": "a/b", "force": "perhaps"}', "invalid_type", "force"),
        ("", b'{"model_name": ["a/b"]}', "invalid_type", "model_name"),
        ("?model_name=a/b", b'{"model_name": "c/d"}', "invalid_value", "model_name"),
        ("?model_name=a/b&model_name=c/d", b"", "invalid_type", "model_name"),
    ],
)
def test_invalid_bodies(managed: Service, query: str, body: bytes, code: str, param: str | None) -> None:
    response = managed.http.post(f"/api/models/download{query}", content=body)
    assert_error(response, 400, code, param=param)


@pytest.mark.parametrize("query", ["model_name=/etc", "model_name=.", "model_name=a/b&source=local"])
def test_directories_cannot_be_named(managed: Service, query: str) -> None:
    """A client cannot make the service read a directory of its machine."""
    response = managed.http.post(f"/api/models/download?{query}")
    assert_error(response, 403, "not_allowed", phrase="EMB_PROVIDER_MODEL_MAPPING")


def test_shutdown_waits_for_no_long_operation(tmp_path: Path, hub: HuggingFaceServer) -> None:
    """The service shuts down although a transfer is stalled and watched, and clients wait for it.

    Clients that wait for a load or a removal get an error at once, and a client that waits for a verification after
    the file that is being hashed.
    """
    hub.repos["acme/checked"] = {**small_repository(60), "notes.txt": b""}
    settings = {
        "PRELOAD_MODELS": "none",
        "HF_ENDPOINT": hub.url,
        "HF_CACHE_DIR": str(tmp_path / "hf"),
        "CACHE_DIR": str(tmp_path / "own"),
    }
    with Service(tmp_path, **settings) as stopping, ThreadPoolExecutor(3) as threads:
        stopping.wait()
        pipe = replace_with_pipe(download(stopping, "acme/checked"))
        name = add_repository(hub, "acme/hangs")
        with hub.faults.holding("model.safetensors", 1000):
            job = start_download(stopping, name)
            wait_for_transfer(hub, name)
            stream = events(stopping, job)
            assert next(stream)[0] == "progress"
            loading = threads.submit(stopping.http.post, "/api/models/load", params={"model_name": name})
            wait_until(lambda: served_models(stopping).get(name, {}).get("state") == "downloading")
            removing = threads.submit(stopping.http.delete, f"/api/models/cache/{name}?unload=true")
            wait_until(lambda: name not in served_models(stopping))
            checking = threads.submit(stopping.http.post, "/api/models/cache/acme/checked/verify")
            with blocked_reader(pipe):
                stopping.signal()
                responses = [loading.result(), removing.result()]
            for response in (*responses, checking.result()):
                assert_error(
                    response, 503, "model_not_ready", param="model", phrase="shutting down", type="server_error"
                )  # fmt: skip
            assert "done" not in dict(stream)
            assert stopping.ended() == 0
            assert "graceful shutdown exceeded" not in stopping.log_text()
