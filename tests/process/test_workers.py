"""Several workers behind one port: equal answers, restarts of one of them, shared limits and metrics, and shutdown."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import psutil
import pytest

from emb_model_provider.api.quotas import Quotas
from emb_model_provider.errors import QuotaExceededError
from emb_model_provider.settings import Settings
from emb_model_provider.workers import SharedMemory
from tests.api.helpers import read_files
from tests.hubs.servers import HuggingFaceServer
from tests.models import save_static
from tests.service import COMMAND, Service, assert_error, environment, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a child inherits sockets")

KEYS = {"first": "secret-of-first", "second": "secret-of-second"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a model that is loaded within milliseconds."""
    return save_static(tmp_path_factory.mktemp("static") / "model")


@pytest.fixture(scope="module")
def hub(model: Path) -> Iterator[HuggingFaceServer]:
    with HuggingFaceServer({"acme/other": read_files(model)}) as server:
        yield server


def settings_of(model: Path, directory: Path, **settings: str) -> dict[str, str]:
    mapping = {name: {"name": f"local/{name}", "path": str(model)} for name in ("main", "second")}
    return {
        "WORKERS": "2",
        "MODEL_MAPPING": json.dumps(mapping),
        "PRELOAD_MODELS": "main",
        "HF_CACHE_DIR": str(directory / "hf"),
    } | settings


@pytest.fixture(scope="module")
def workers(model: Path, hub: HuggingFaceServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Yield a service with two workers, which both accept connections."""
    directory = tmp_path_factory.mktemp("workers")
    with Service(directory, **settings_of(model, directory, HF_ENDPOINT=hub.url)) as started:
        yield started.wait()


class Connections:
    """Connections that are kept open, so that both workers have some."""

    def __init__(self, service: Service, count: int = 8, **headers: str) -> None:
        self._stack = ExitStack()
        self.clients = [
            self._stack.enter_context(httpx.Client(base_url=service.url, timeout=240, trust_env=False, headers=headers))
            for _ in range(count)
        ]
        for client in self.clients:
            client.get("/health").raise_for_status()

    def __enter__(self) -> list[httpx.Client]:
        return self.clients

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def embed(client: httpx.Client, name: str = "main", text: str = "hello") -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": name, "input": text})


def processes(service: Service) -> dict[int, int]:
    """Return the process id of each worker; the latest one."""
    return {int(index): int(pid) for index, pid in re.findall(r"worker (\d+) is process (\d+)", service.stderr_text())}


def answered(service: Service) -> list[int]:
    """Return how many requests for embeddings each worker has logged."""
    counts = []
    for name in ("emb_model_provider.log", "emb_model_provider.worker-1.log"):
        path = service.directory / "logs" / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        counts.append(sum("/v1/embeddings" in line and "access" in line for line in text.splitlines()))
    return counts


def wait_until_all_answer(service: Service, count: int = 8) -> None:
    """Wait until each worker answers requests for the model itself, which a follower does when it has loaded it."""

    def both_answer() -> bool:
        before = answered(service)
        with Connections(service, count) as clients:
            for client in clients:
                assert embed(client).status_code == 200
        wait_until(lambda: sum(answered(service)) >= sum(before) + count)
        return all(after > earlier for after, earlier in zip(answered(service), before, strict=True))

    wait_until(both_answer)


def test_both_workers_answer_with_the_same_vectors(workers: Service) -> None:
    """Connections are divided equally, and it makes no difference which one a client has."""
    wait_until_all_answer(workers)
    before = answered(workers)
    with Connections(workers, 16) as clients:
        vectors = [embed(client).json()["data"][0]["embedding"] for client in clients]
        wait_until(lambda: sum(answered(workers)) == sum(before) + 16)
    assert all(vector == vectors[0] for vector in vectors)
    assert len(vectors[0]) == 24
    shares = [after - earlier for after, earlier in zip(answered(workers), before, strict=True)]
    assert min(shares) >= 6, shares


def test_metrics_are_those_of_the_whole_service(workers: Service) -> None:
    """Whichever worker is asked: counters are sums, and a model has one state."""
    wait_until_all_answer(workers)
    labels = {"model": "main", "status": "200"}
    before = workers.figure("emb_provider_requests_total", **labels)
    with Connections(workers) as clients:
        for client in clients:
            embed(client)
        wait_until(lambda: workers.figure("emb_provider_requests_total", **labels) == before + 8)
        texts = [client.get("/metrics").text for client in clients]
    assert workers.figure("emb_provider_request_seconds_count", model="main") == before + 8
    assert workers.figure("emb_provider_model_state", model="main", state="ready") == 1
    resident = workers.figure("process_resident_memory_bytes")
    parts = [psutil.Process(pid).memory_info().rss for pid in processes(workers).values()]
    assert max(parts) * 1.5 < resident < sum(parts) * 1.5
    series = [sorted(re.findall(r"^(emb_provider_\S+) ", text, re.MULTILINE)) for text in texts]
    assert all(each == series[0] for each in series)
    assert len(series[0]) == len(set(series[0])), "a series occurs twice"
    for name in ("emb_provider_build_info", "process_start_time_seconds", "emb_provider_queue_tokens"):
        assert texts[0].count(f"# TYPE {name} ") == 1
    # What a dashboard of one process expects.
    assert "# HELP emb_provider_requests_total Requests for embeddings or scores." in texts[0]


def test_every_worker_follows_loads_and_unloads(workers: Service) -> None:
    """A model is served by all workers when the response to `load` comes, and by none after `forget`."""
    with Connections(workers) as clients:
        assert {embed(client, "acme/other").status_code for client in clients} == {404}
        loaded = clients[-1].post("/api/models/load", params={"model_name": "acme/other", "alias": "added"})
        assert loaded.status_code == 200, loaded.text
        vectors = [embed(client, "added").json()["data"] for client in clients]
        assert all(vector == vectors[0] for vector in vectors)
        for client in clients:
            assert client.get("/v1/models/added").json()["state"] == "ready"
            assert "added" in {model["alias"] for model in client.get("/api/models").json()["models"]}
        assert clients[0].post("/api/models/unload", params={"model_name": "added"}).json()["state"] == "unloaded"
        assert {client.get("/v1/models/added").json()["state"] for client in clients} == {"unloaded"}
        assert {embed(client, "added").status_code for client in clients} == {200}
        forgotten = clients[1].post("/api/models/unload", params={"model_name": "added", "forget": "true"})
        assert forgotten.status_code == 200
        for client in clients:
            assert_error(embed(client, "added"), 404, "model_not_found", param="model")


def test_files_that_a_follower_uses_are_removed(workers: Service) -> None:
    """Each worker holds a lock on the files of its models, and all release it before `unload=true` removes them."""
    with Connections(workers) as clients:
        clients[0].post("/api/models/load", params={"model_name": "acme/other", "alias": "added"}).raise_for_status()
        for client in clients:
            assert embed(client, "added").status_code == 200
        for client in clients:
            refused = client.delete("/api/models/cache/acme/other")
            assert_error(refused, 409, "model_in_use", phrase="loaded as `added`")
        removed = clients[-1].delete("/api/models/cache/acme/other", params={"unload": "true"})
        assert removed.status_code == 200, removed.text
        assert removed.json()["unloaded"] == ["added"]
        assert {embed(client, "added").status_code for client in clients} == {404}


def test_every_route_answers_the_same_at_each_worker(workers: Service) -> None:
    """Pages, lists and errors, access rules for the real client, and no way to the routes between workers."""
    private = {"x-emb-worker-client": '["192.0.2.1", 1]'}
    expected = {
        "/": 200, "/docs": 200, "/openapi.json": 200, "/ready": 200, "/console/": 200, "/v1/models": 200, "/health": 200,
        "/api/models/cache/list": 200, "/v1/batches": 200, "/sync": 404, "/live-metrics": 404, "/v1/models/a%20b%2Fc": 404,
    }  # fmt: skip
    with Connections(workers) as clients:
        for path, status in expected.items():
            responses = [client.get(path, headers=private) for client in clients]
            assert {len(response.headers.get_list("date")) for response in responses} == {1}
            assert {response.status_code for response in responses} == {status}, path
            bodies = {re.sub(r'"(memory_bytes|created|last_used)":[^,}]*', "", response.text) for response in responses}
            assert len(bodies) == 1 or path == "/console/", path  # it shows the present load
            assert {client.head(path).status_code for client in clients} == {status}, path
        for client in clients:
            proxied = client.get("/api/models", headers={"x-forwarded-for": "192.0.2.1"})
            assert_error(proxied, 403, "admin_only")
            assert_error(client.post("/api/models/load", content=b"x" * 2_000_000), 413, "request_too_large")


def test_model_is_loaded_by_its_first_request(workers: Service) -> None:
    """A worker that has not loaded it lets worker 0 answer: with vectors, errors, limits and the request id."""
    with Connections(workers) as clients:
        for client in clients:
            client.post("/api/models/unload", params={"model_name": "second"}).raise_for_status()
            response = client.post(
                "/v1/embeddings", json={"model": "second", "input": ["hello"] * 3}, headers={"x-request-id": "mine"}
            )
            assert (response.status_code, response.headers["x-request-id"]) == (200, "mine")
            assert len(response.json()["data"]) == 3
            assert_error(embed(client, "nothing"), 404, "model_not_found", param="model")
            invalid = client.post("/v1/embeddings", content=b"{", headers={"content-type": "application/json"})
            assert_error(invalid, 400, "invalid_json")


def test_batches_are_answered(workers: Service) -> None:
    """Its file and its batch are the same for every worker, and a model that is not loaded is loaded for it."""
    lines = [
        json.dumps(
            {
                "custom_id": f"{n}",
                "method": "POST",
                "url": "/v1/embeddings",
                "body": {"model": "second", "input": f"t {n}"},
            }
        )
        for n in range(2000)
    ]
    with Connections(workers) as clients:
        clients[0].post("/api/models/unload", params={"model_name": "second"}).raise_for_status()
        upload = {"file": ("batch.jsonl", "\n".join(lines).encode())}
        file = clients[0].post("/v1/files", files=upload, data={"purpose": "batch"}).json()
        body = {"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
        batch = clients[1].post("/v1/batches", json=body).json()
        wait_until(lambda: clients[2].get(f"/v1/batches/{batch['id']}").json()["status"] == "completed")
        done = clients[3].get(f"/v1/batches/{batch['id']}").json()
        assert done["request_counts"] == {"total": 2000, "completed": 2000, "failed": 0}
        contents = {client.get(f"/v1/files/{done['output_file_id']}/content").text for client in clients}
        figures = [client.get("/metrics").text for client in clients]
    for text in figures:
        assert 'emb_provider_batch_jobs{state="completed"} 1.0' in text
        assert 'emb_provider_batch_job_lines_total{outcome="completed"} 2000.0' in text
    assert len(list((workers.directory / "cache" / "batch" / "workers").iterdir())) == 2, "each worker computes lines"
    (content,) = contents
    assert sorted(int(json.loads(line)["custom_id"]) for line in content.splitlines()) == list(range(2000))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 0])
def test_killed_worker_is_restarted_alone(workers: Service, killed: int) -> None:
    """The others answer meanwhile, and clients that retry, as OpenAI's SDK does, see no error."""
    wait_until_all_answer(workers)
    before = processes(workers)
    stopping = threading.Event()

    def request() -> int:
        client = openai.OpenAI(
            base_url=f"{workers.url}/v1", api_key="none", max_retries=8, http_client=httpx.Client(trust_env=False)
        )
        count = 0
        with client:
            while not stopping.is_set():
                created = client.embeddings.create(model="main", input="hello")
                assert len(created.data[0].embedding) == 24
                count += 1
        return count

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(request) for _ in range(8)]
        try:
            for _ in range(2):
                present = processes(workers)
                os.kill(present[killed], signal.SIGKILL)
                wait_until(lambda present=present: processes(workers)[killed] != present[killed])
                wait_until_all_answer(workers)
        finally:
            stopping.set()
        counts = [future.result() for future in running]
    assert min(counts) > 0
    after = processes(workers)
    assert after[killed] != before[killed]
    assert after[1 - killed] == before[1 - killed]
    assert f"worker {killed} was killed by SIGKILL" in workers.stderr_text()
    workers.wait()


@pytest.mark.slow
def test_stopped_worker_is_replaced_while_the_other_answers(workers: Service) -> None:
    """One that sends no heartbeat, as if native code held the interpreter lock."""
    wait_until_all_answer(workers)
    before = processes(workers)
    with Connections(workers) as clients:
        os.kill(before[1], signal.SIGSTOP)
        # Those of worker 0; the others wait until the connection ends.
        with ThreadPoolExecutor(len(clients)) as pool:
            requests = [pool.submit(embed, client) for client in clients]
            wait_until(lambda: sum(request.done() and not request.exception() for request in requests) >= 2)
            assert processes(workers) == before
            wait_until(lambda: processes(workers)[1] != before[1])
            wait_until(lambda: all(request.done() for request in requests))
    assert "worker 1 sent no heartbeat" in workers.stderr_text()
    assert processes(workers)[0] == before[0]
    wait_until_all_answer(workers)


@pytest.mark.slow
def test_counters_go_on_after_a_restart(workers: Service) -> None:
    """A sum that fell would be counted again by Prometheus."""
    wait_until_all_answer(workers)
    before = workers.figure("emb_provider_requests_total")
    for index, pid in processes(workers).items():
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda index=index, pid=pid: processes(workers)[index] != pid)
    wait_until_all_answer(workers)
    assert workers.figure("emb_provider_requests_total") > before


@pytest.mark.slow
def test_shutdown_ends_all_processes(model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Accepted requests are finished, the exit code is 0, and neither a process nor a file for the workers is left."""
    directory = tmp_path / "service"
    # Not below `tmp_path`, which is too long for the path of a Unix socket.
    temporary = Path(tempfile.mkdtemp())
    request.addfinalizer(lambda: shutil.rmtree(temporary))
    program = (
        f"import os, tempfile; tempfile.tempdir = {str(temporary)!r}; from emb_model_provider.main import run; run()"
    )
    command = [COMMAND[0], "-c", program]
    with Service(directory, command=command, **settings_of(model, directory)) as service:
        service.wait()
        wait_until_all_answer(service)
        assert any(temporary.iterdir())
        children = [
            *processes(service).values(),
            *(each.pid for each in psutil.Process(service.process.pid).children(recursive=True)),
        ]
        with Connections(service) as clients, ThreadPoolExecutor(8) as pool:
            requests = [pool.submit(embed, client, text="word " * 20_000) for client in clients]
            wait_until(lambda: any(each.done() for each in requests))
            assert service.stop() == 0
            assert {each.result().status_code for each in requests} <= {200, 503}
    assert not any(map(psutil.pid_exists, children))
    assert not any(path.name.startswith("emb-workers-") for path in temporary.iterdir())


@pytest.mark.slow
def test_quota_is_that_of_all_workers(model: Path, tmp_path: Path) -> None:
    """Tokens that a key used at one worker are missing at the other."""
    settings = {
        "API_KEYS": ",".join(KEYS.values()),
        "API_KEY_NAMES": ",".join(KEYS),
        "QUOTAS": json.dumps({"first": 60}),
    }
    with Service(tmp_path, **settings_of(model, tmp_path, **settings)) as service:
        service.wait()
        with Connections(service, authorization=f"Bearer {KEYS['first']}") as clients:
            assert embed(clients[0], text="word " * 200).status_code == 200
            wait_until(lambda: embed(clients[0]).status_code == 429)
            assert {embed(client).status_code for client in clients} == {429}
        with Connections(service, authorization=f"Bearer {KEYS['second']}") as clients:
            assert {embed(client).status_code for client in clients} == {200}


def test_buckets_in_shared_memory_are_those_of_one_process(tmp_path: Path) -> None:
    """Two workers that map the same file have one bucket for each key."""
    SharedMemory.create(tmp_path / "shared", 2, 2)
    first, second = (
        Quotas({"a": 60, "b": 60}, lambda: 1000.0, shared=SharedMemory(tmp_path / "shared", 2), names=("a", "b"))
        for _ in range(2)
    )
    first.check("a")
    first.charge("a", 40)
    second.check("a")
    second.charge("a", 20)
    for quotas in (first, second):
        with pytest.raises(QuotaExceededError):
            quotas.check("a")
        quotas.check("b")


def test_limits_are_divided() -> None:
    """All workers together keep the limits of the service. A body of MAX_BODY_MB is accepted by each."""
    settings = Settings.from_values(
        workers=4,
        result_cache_mb=64,
        model_memory_limit="4GB",
        max_queue_tokens=10,
        max_body_mb=32,
        max_pending_body_mb=64,
    )
    share = settings.share_of_worker()
    assert share.memory.result_cache_bytes == 16_000_000
    assert share.memory.model_memory_limit == 1_000_000_000
    assert share.batching.max_queue_tokens == 3
    assert share.limits.max_pending_body_mb == 32


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_wrong_number_of_workers_stops_the_start(tmp_path: Path, value: str) -> None:
    """One line says which setting is wrong."""
    done = subprocess.run(
        COMMAND, cwd=tmp_path, env=environment(tmp_path, WORKERS=value), capture_output=True, text=True, check=False
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert f"EMB_PROVIDER_WORKERS={value}" in done.stderr


@pytest.mark.slow
def test_service_without_a_model_exits(tmp_path: Path) -> None:
    """All workers end if worker 0 can load no model, with its exit code."""
    settings: dict[str, Any] = {"WORKERS": "2", "MODEL_PATH": str(tmp_path / "empty"), "MODEL_NAME": "empty"}
    (tmp_path / "empty").mkdir()
    with Service(tmp_path / "service", **settings) as service:
        assert service.ended() == 1
        assert "no model could be loaded" in service.stderr_text()
        assert not any(map(psutil.pid_exists, processes(service).values()))
