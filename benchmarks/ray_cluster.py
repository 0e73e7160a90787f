"""Ray Serve with several replicas and nodes on this machine, as a process: `python -m benchmarks.ray_cluster`.

It reads its arguments as JSON, and prints its result as JSON. The model sleeps for each token, and needs almost no processor, so that the replicas of a small
machine are as fast as those of a large one.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import openai
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.cluster_utils import Cluster

from benchmarks.report import log_progress
from benchmarks.sleeping import SLEEP, slow_down
from emb_model_provider.cluster.ray_serve import Options, build
from emb_model_provider.embedder import Embedder
from emb_model_provider.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


NAME = "embeddings"
MODEL = "static"
_TEXTS = 16
"""Texts of a request."""
_KNOWN_TEXTS = 4096
_MEMORY = 80 * 2**20
_WAIT_S = 180.0
_BATCH_S, _TOKEN_S = 0.005, 0.0015
_FASTER_TOKEN_S = 0.0001
"""For faults: many requests are on their way when something fails."""


class Load:
    """Clients of OpenAI's SDK that send requests until they are stopped. Each request has texts of its own.

    The texts differ, because a replica computes equal texts of waiting requests only once.
    """

    def __init__(self, url: str, expected: Mapping[str, list[float]], *, retries: int = 2, clients: int = 8) -> None:
        """Create clients, which compare the vectors of all texts with the expected ones."""
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=retries, timeout=60)
        self._expected = expected
        self._stopped = threading.Event()
        self.finished: list[float] = []
        """When requests were answered, on the monotonic clock."""
        self.longest_s = 0.0
        self.retried = 0
        """Number of requests that were answered after a retry."""
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=self._send) for _ in range(clients)]

    @property
    def answers(self) -> int:
        return len(self.finished)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, answers: int) -> None:
        """Wait until a further number of requests is answered."""
        wanted = self.answers + answers
        wait_until(lambda: self.answers >= wanted)

    def _send(self) -> None:
        known = list(self._expected)
        choice = random.Random()  # noqa: S311 - not secret
        while not self._stopped.is_set():
            texts = choice.sample(known, _TEXTS)
            started = time.monotonic()
            try:
                answer = self._client.embeddings.with_raw_response.create(
                    model=MODEL, input=texts, encoding_format="float"
                )
                for text, item in zip(texts, answer.parse().data, strict=True):
                    if max(abs(a - b) for a, b in zip(item.embedding, self._expected[text], strict=True)) > 1e-5:
                        self.errors.append(f"a wrong vector of {text!r}")
                self.retried += answer.retries_taken > 0
                self.finished.append(time.monotonic())
            except openai.OpenAIError as error:
                self.errors.append(f"{type(error).__name__}: {error}")
            self.longest_s = max(self.longest_s, time.monotonic() - started)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"the condition did not become true: {serve.status()}")
        time.sleep(0.1)


def deploy(name: str, route: str, variables: dict[str, str], **options: Any) -> float:
    """Deploy an application whose replicas have these variables, and return how many seconds it took until it was running."""
    started = time.monotonic()
    application = build(Options(**options))
    deployment = application._bound_deployment.options(
        ray_actor_options={"num_cpus": options["num_cpus"], "runtime_env": {"env_vars": variables}}
    )
    serve.run(deployment.bind(), name=name, route_prefix=route)
    return time.monotonic() - started


def replicas(name: str = NAME) -> list[str]:
    """Return the names of the actors that are replicas of an application."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["name"].startswith(f"SERVE_REPLICA::{name}#")]


def kill(name: str, *, restarts: bool = False) -> None:
    """Kill the process of an actor of Ray Serve."""
    ray.kill(ray.get_actor(name, namespace="serve"), no_restart=not restarts)


def count_running(name: str = NAME) -> int:
    (deployment,) = serve.status().applications[name].deployments.values()
    running: int = deployment.replica_states.get("RUNNING", 0)
    return running


def answering_replicas(name: str) -> set[str]:
    """Return the replicas of an application that have answered requests for embeddings, as Ray's metrics show them."""
    found = set()
    for node in ray.nodes():
        url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "ray_emb_provider_requests_total" and sample.labels["application"] == name:
                    found.add(sample.labels["replica"])
    return found


def measure_throughput(
    port: int,
    expected: Mapping[str, list[float]],
    variables: dict[str, str],
    sizes: list[int],
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """Send requests to an application of each size in turn; return requests per second, and replicas that have answered."""
    url = f"http://127.0.0.1:{port}"
    errors: list[str] = []
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    with _cluster(port, [sum(sizes)]):
        for size in sizes:
            log_progress(f"starting {size} replica(s)")
            deploy(
                f"size-{size}",
                f"/{size}",
                {**variables, SLEEP: f"{_BATCH_S},{_TOKEN_S}"},
                num_cpus=1,
                min_replicas=size,
            )
        for _ in range(rounds):
            for size in sizes:
                with Load(f"{url}/{size}", expected, clients=8 * size) as load:
                    load.wait_for(8 * size)
                    started = time.monotonic()
                    time.sleep(seconds)
                    ended = time.monotonic()
                count = sum(started < finished <= ended for finished in load.finished)
                rates[size].append(count / (ended - started))
                errors += load.errors
                log_progress(f"{size} replica(s): {rates[size][-1]:.2f} requests/s")
        # Ray exports the metrics of a replica some seconds later.
        deadline = time.monotonic() + 45
        answered = {}
        while time.monotonic() < deadline:
            answered = {size: len(answering_replicas(f"size-{size}")) for size in sizes}
            if all(answered[size] == size for size in sizes):
                break
            time.sleep(1)
    return {
        "sizes": [{"replicas": size, "answered": answered[size], "rates": rates[size]} for size in sizes],
        "errors": errors,
    }


def measure_faults(port: int, expected: Mapping[str, list[float]], variables: dict[str, str]) -> dict[str, Any]:
    """Disturb a cluster of three nodes under load; return what clients noticed of each event."""
    url = f"http://127.0.0.1:{port}"
    slow = {**variables, SLEEP: f"{_BATCH_S},{_FASTER_TOKEN_S}"}
    events: list[dict[str, Any]] = []

    @contextmanager
    def event(name: str, retries: int = 2, path: str = "", before: int = 50) -> Iterator[None]:
        log_progress(name)
        with Load(f"{url}{path}", expected, retries=retries) as load:
            load.wait_for(before)
            started = time.monotonic()
            yield
            recovered_s = time.monotonic() - started
            load.wait_for(50)
        events.append(
            {
                "event": name,
                "retries": retries,
                "answers": load.answers,
                "errors": load.errors,
                "retried": load.retried,
                "pause_s": max(later - earlier for earlier, later in itertools.pairwise(load.finished)),
                "longest_s": load.longest_s,
                "recovered_s": recovered_s,
            }
        )

    def kill_replica() -> None:
        before = set(replicas())
        kill(min(before))
        wait_until(lambda: set(replicas()) - before and count_running() == 2)

    # Each node has room for one replica.
    with _cluster(port, [1, 1, 1]) as cluster:
        deploy(NAME, "/", slow, num_cpus=1, min_replicas=2)
        with event("a replica is killed"):
            kill_replica()
        with event("a node is killed"):
            lost = next(node for node in cluster.worker_nodes if _has_replica(node))
            cluster.remove_node(lost, allow_graceful=False)
            wait_until(lambda: count_running() < 2)
            wait_until(lambda: count_running() == 2)
        add_node(cluster, 1)
        with event("the controller is killed"):
            before = _controller_pid()
            kill("SERVE_CONTROLLER_ACTOR", restarts=True)
            wait_until(lambda: _controller_pid() not in (None, before))
            wait_until(lambda: count_running() == 2)
        with event("a replica is killed after that"):
            kill_replica()
        with event("a rolling deploy", retries=0):
            deploy(NAME, "/", {**slow, "EMB_PROVIDER_MAX_BATCH_SIZE": "32"}, num_cpus=1, min_replicas=2)
        serve.delete(NAME)
        deploy(
            "scaled", "/scaled", {**variables, SLEEP: f"{_BATCH_S},{_TOKEN_S}"},
            num_cpus=1, max_replicas=2, queued_tokens=100, upscale_delay_s=0,
        )  # fmt: skip
        with event("a step of load adds a replica", path="/scaled", before=0):
            wait_until(lambda: count_running("scaled") == 2)
    return {"events": events}


@contextmanager
def _cluster(port: int, nodes: list[int]) -> Iterator[Cluster]:
    """Start a cluster whose nodes have these numbers of processors, which Ray only counts, and Ray Serve on its head."""
    cluster = Cluster()
    try:
        add_node(cluster, 0, include_dashboard=False)
        for processors in nodes:
            add_node(cluster, processors)
        hook = f"{slow_down.__module__}.{slow_down.__name__}"
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"worker_process_setup_hook": hook})
        # One proxy, because those of other nodes would need the same port of this machine.
        serve.start(
            proxy_location="HeadOnly", http_options={"port": port, "host": "127.0.0.1"}, grpc_options={"port": port + 1}
        )
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def add_node(cluster: Cluster, processors: int, **options: Any) -> None:
    cluster.add_node(num_cpus=processors, object_store_memory=_MEMORY, node_ip_address="127.0.0.1", **options)


def _has_replica(node: Any) -> bool:
    return any(
        actor["ActorClassName"].startswith("ServeReplica")
        and actor["State"] == "ALIVE"
        and actor["Address"]["NodeID"] == node.node_id
        for actor in ray._private.state.actors().values()
    )


def _controller_pid() -> int | None:
    for actor in ray._private.state.actors().values():
        if actor["Name"] == "SERVE_CONTROLLER_ACTOR" and actor["State"] == "ALIVE":
            pid: int = actor["Pid"]
            return pid
    return None


_PARTS: dict[str, Callable[..., dict[str, Any]]] = {"throughput": measure_throughput, "faults": measure_faults}


def main(part: str, model: str, cache: str, **arguments: Any) -> dict[str, Any]:
    mapping = {MODEL: {"path": model}}
    texts = [f"the quick brown fox number {number}" for number in range(_KNOWN_TEXTS)]
    with Embedder(settings=Settings.from_values(cache_dir=cache, offline=True, model_mapping=mapping)) as embedder:
        expected = dict(zip(texts, embedder.embed(texts).tolist(), strict=True))
    variables = {
        "EMB_PROVIDER_CACHE_DIR": cache,
        "EMB_PROVIDER_MODEL_MAPPING": json.dumps(mapping),
        "EMB_PROVIDER_RESULT_CACHE_MB": "0",
    }
    return _PARTS[part](expected=expected, variables=variables, **arguments)


if __name__ == "__main__":
    print(json.dumps(main(**json.load(sys.stdin))))
