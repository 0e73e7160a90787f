"""Serves a model with Ray Serve on this machine, and requests each kind of route."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import ray
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from emb_model_provider.cluster.ray_serve import Options, build

_REQUESTS = "emb_provider_requests_total"


def check_configuration(path: str) -> dict[str, Any]:
    """Read a file of `serve deploy`, and return its arguments with their defaults."""
    config = ServeDeploySchema.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert getattr(import_module(module), name) is build
    return Options(**application.args).model_dump()


def main(port: int, configuration: str) -> dict[str, Any]:
    ray.init(address="local", num_cpus=8, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"port": port, "host": "127.0.0.1"}, grpc_options={"port": port + 1})
    serve.run(build(Options()), name="embeddings", route_prefix="/prefix")
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}/prefix", trust_env=False)
    ready = http.get("/ready")
    result = {
        "configuration": check_configuration(configuration),
        "ready": [ready.status_code, ready.json()["status"]],
        "management": http.post("/api/models/unload", params={"model_name": "static"}).status_code,
        "embeddings": http.post("/v1/embeddings", json={"input": "the quick brown fox"}).status_code,
        "requests": [line for line in http.get("/metrics").text.splitlines() if line.startswith(_REQUESTS)],
        "console": http.get("/console").status_code,
    }
    serve.shutdown()
    return result


if __name__ == "__main__":
    print(json.dumps(main(**json.load(sys.stdin))))  # noqa: T201 - read by the test
