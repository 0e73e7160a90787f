"""`POST /api/models/transfer`: transfers over HTTP, as jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.service import Service, wait_until
from tests.transfer.helpers import DESTINATION, SOURCE, TOKEN, mirrored, model_files
from tests.transfer.servers import DestinationServer, SourceServer

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUTE = "/api/models/transfer"


@pytest.fixture(scope="module")
def source() -> Iterator[SourceServer]:
    with SourceServer({SOURCE: model_files()}) as server:
        yield server


@pytest.fixture(scope="module")
def destination() -> Iterator[DestinationServer]:
    with DestinationServer({}, token=TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, source: SourceServer, destination: DestinationServer
) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("service")
    settings = {
        "PRELOAD_MODELS": "none",
        "HF_ENDPOINT": source.url,
        "MODELSCOPE_ENDPOINT": destination.url,
        "MODELSCOPE_TOKEN": TOKEN,
    }
    with Service(directory, **settings) as started:
        yield started.wait()


def wait_for_end(service: Service, job: dict[str, Any]) -> dict[str, Any]:
    wait_until(lambda: service.http.get(job["url"]).json()["state"] in ("done", "failed", "cancelled"))
    ended: dict[str, Any] = service.http.get(job["url"]).json()
    return ended


def test_a_transfer_is_a_job(service: Service, source: SourceServer, destination: DestinationServer) -> None:
    """It is accepted at once, watched like a download, and listed with the downloads."""
    response = service.http.post(ROUTE, params={"model_name": SOURCE, "destination": DESTINATION})
    assert response.status_code == 202
    job = wait_for_end(service, response.json())
    # Relative, and so right behind a proxy that adds a prefix to the paths.
    behind_proxy = httpx.URL("https://proxy.example/prefix/api/models/transfer")
    assert behind_proxy.join(response.headers["location"]).path == f"/prefix{job['url']}"
    assert (job["kind"], job["state"], job["error"]) == ("transfer", "done", None)
    assert (job["source"], job["destination"]) == ("huggingface", f"modelscope:{DESTINATION}")
    assert job["revision"] == source.commit(SOURCE)
    assert "5 of 5 files were sent" in job["notes"][0]
    assert mirrored(source, destination)
    assert job["id"] in [each["id"] for each in service.http.get("/api/models/jobs").json()["jobs"]]


def test_equal_transfers_share_a_job_and_can_be_cancelled(
    service: Service, source: SourceServer, destination: DestinationServer
) -> None:
    source.repos["acme/held"] = {**model_files(), "model.safetensors": bytes(range(256)) * 400}
    query = {"model_name": "acme/held", "destination": "mirrors/held"}
    with source.faults.holding("model.safetensors", 1000):
        first = service.http.post(ROUTE, params=query).json()
        assert service.http.post(ROUTE, params=query).json()["id"] == first["id"]
        other = service.http.post(ROUTE, params=query | {"destination": "mirrors/other"}).json()
        assert other["id"] != first["id"]
        for job in (first, other):
            service.http.delete(job["url"])
    assert {wait_for_end(service, job)["state"] for job in (first, other)} == {"cancelled"}
    assert "mirrors/held" not in [commit["repo"] for commit in destination.commits]


@pytest.mark.parametrize(
    ("info", "query", "code"),
    [
        ({"gated": "auto", "cardData": {"license": "mit"}}, {}, "permission_required"),
        ({"cardData": {"license": "cc-by-nc-4.0"}}, {}, "permission_required"),
        ({"gated": "auto", "cardData": {"license": "mit"}}, {"i_have_permission": "true"}, None),
    ],
    ids=str,
)
def test_a_failed_transfer_has_a_reason(
    info: dict[str, object], query: dict[str, str], code: str | None, service: Service, source: SourceServer
) -> None:
    source.repos["acme/gated"] = model_files(9)
    source.info["acme/gated"] = info
    job = service.http.post(
        ROUTE, params={"model_name": "acme/gated", "destination": "mirrors/gated", "license": "mit", **query}
    ).json()
    assert wait_for_end(service, job)["error_code"] == code


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ({"model_name": SOURCE}, 400, None),
        ({"model_name": "../x", "destination": "a/b"}, 400, "invalid_transfer"),
        ({"model_name": SOURCE, "destination": "dir:/tmp/x"}, 403, "not_allowed"),
        ({"model_name": SOURCE, "destination": "a/b", "licence": "mit"}, 400, None),
    ],
)
def test_invalid_requests_are_refused(query: dict[str, str], status: int, code: str | None, service: Service) -> None:
    """A client cannot write to a directory of the machine."""
    response = service.http.post(ROUTE, params=query)
    assert response.status_code == status
    if code is not None:
        assert response.json()["error"]["code"] == code


def test_other_machines_may_not_transfer(service: Service) -> None:
    """Without admin keys, only direct clients on the same machine may use the route."""
    response = httpx.post(
        f"{service.url}{ROUTE}",
        params={"model_name": SOURCE, "destination": DESTINATION},
        headers={"x-forwarded-for": "192.0.2.1"},
        trust_env=False,
    )
    assert response.status_code == 403
