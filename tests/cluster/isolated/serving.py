"""Serves a model with Ray Serve on this machine, and disturbs it while clients send requests."""

from __future__ import annotations

import json
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import openai
import ray
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from emb_model_provider.cluster.ray_serve import Options, build

NAME = "embeddings"


class Load:
    """Clients that send requests until they are stopped. Each text has its own vector, which is known."""

    def __init__(self, url: str, expected: dict[str, list[float]], retries: int, model: str = "static") -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=retries, timeout=60)
        self._expected = expected
        self._model = model
        self._stopped = threading.Event()
        self.answers = 0
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=self._send) for _ in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        texts = list(self._expected) or [f"the quick brown fox {number} " * 20 for number in range(256)]
        while not self._stopped.is_set():
            try:
                response = self._client.embeddings.create(model=self._model, input=texts, encoding_format="float")
                vectors = [item.embedding for item in response.data]
                wrong = [
                    text
                    for text, vector in zip(texts, vectors, strict=True)
                    if text in self._expected
                    and max(abs(a - b) for a, b in zip(vector, self._expected[text], strict=True)) > 1e-5
                ]
                self.errors += [f"wrong vectors of {wrong}"] if wrong else []
                self.answers += 1
            except openai.OpenAIError as error:
                self.errors.append(f"{type(error).__name__}: {error}")


def deploy(name: str, route: str, variables: dict[str, str], **options: Any) -> float:
    """Deploy an application, and return how long it took until it was running."""
    started = time.monotonic()
    application = build(Options(**options))
    deployment = application._bound_deployment.options(
        ray_actor_options={"num_cpus": options["num_cpus"], "runtime_env": {"env_vars": variables}}
    )
    serve.run(deployment.bind(), name=name, route_prefix=route)
    return time.monotonic() - started


def replicas() -> list[Any]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [
        ray.get_actor(actor["name"], namespace=actor["namespace"])
        for actor in actors
        if actor["name"].startswith(f"SERVE_REPLICA::{NAME}#")
    ]


def count_running(name: str = NAME) -> int:
    (deployment,) = serve.status().applications[name].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"the condition did not become true: {serve.status()}")
        time.sleep(0.1)


def check_configuration(path: str) -> dict[str, Any]:
    """Read a file of `serve deploy`, and return its arguments with their defaults."""
    config = ServeDeploySchema.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert getattr(import_module(module), name) is build
    return Options(**application.args).model_dump()


def main(
    port: int,
    expected: dict[str, list[float]],
    variables: dict[str, str],
    slow_variables: dict[str, str],
    slow_model: str,
    configuration: str,
) -> dict[str, Any]:
    ray.init(num_cpus=8, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"port": port, "host": "127.0.0.1"}, grpc_options={"port": port + 1})
    url = f"http://127.0.0.1:{port}"
    result: dict[str, Any] = {"start_s": deploy(NAME, "/", variables, num_cpus=1, min_replicas=2)}
    result["configuration"] = check_configuration(configuration)
    http = httpx.Client(base_url=url, trust_env=False)
    ready = http.get("/ready")
    result["ready"] = [ready.status_code, ready.json()["status"]]
    refused = http.post("/api/models/unload", params={"model_name": "static"})
    result["management"] = refused.status_code
    result["console"] = http.get("/console").status_code

    with Load(url, expected, retries=2) as load:
        wait_until(lambda: load.answers > 20)
        ray.kill(replicas()[0], no_restart=True)
        wait_until(lambda: count_running() < 2 or load.errors)
        wait_until(lambda: count_running() == 2)
        answered = load.answers
        wait_until(lambda: load.answers > answered + 20)
    result["kill"] = load.errors[:5]

    with Load(url, expected, retries=0) as load:
        wait_until(lambda: load.answers > 20)
        result["deploy_s"] = deploy(
            NAME, "/", {**variables, "EMB_PROVIDER_MAX_BATCH_SIZE": "32"}, num_cpus=1, min_replicas=2
        )
        answered = load.answers
        wait_until(lambda: load.answers > answered + 20)
    result["deploy"] = load.errors[:5]

    deploy("scaled", "/scaled", slow_variables, num_cpus=1, max_replicas=2, queued_tokens=100, upscale_delay_s=0)
    result["before"] = count_running("scaled")
    with Load(f"{url}/scaled", {}, retries=2, model=slow_model) as load:
        wait_until(lambda: count_running("scaled") == 2)
        answered = load.answers
        wait_until(lambda: load.answers > answered)
    result["scaled"] = load.errors[:5]
    serve.shutdown()
    return result


if __name__ == "__main__":
    print(json.dumps(main(**json.load(sys.stdin))))  # noqa: T201 - read by the test
