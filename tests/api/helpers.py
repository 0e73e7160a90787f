"""Keys, models, texts and calls that the API tests share."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
from safetensors.numpy import load_file, save_file

from emb_model_provider.hubs.local import find_bundled
from tests.service import BUNDLED, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from tests.service import Service

KEYS = ("sk-test-first-0123456789", "sk-test-zweiter-schlüssel")
SECRETS = {name: f"hush-{name}-0123456789" for name in ("admin", "hf", "modelscope", "mini", "stuck")}
"""Keys and tokens of the `impatient` service, which it must not reveal."""
ORIGIN = "https://app.example"
"""The origin that the `guarded` service allows."""
POISON = "zebra"
"""The only text for which the poisoned model returns a non-finite vector."""

MAPPING: dict[str, dict[str, Any]] = {
    "mini": {
        "name": BUNDLED,
        "precision": "fp32",
        "dimensions": "any",
        "prompts": {"query": "query: ", "document": "passage: "},
    },
    "strict": {"name": BUNDLED, "precision": "fp32", "truncate": "NONE"},
    "team/own-ids": {"name": BUNDLED, "precision": "fp32", "token_input": "model", "dimensions": [64, 128]},
    "openai-ids": {"name": BUNDLED, "precision": "fp32", "token_input": "cl100k"},
    "no-ids": {"name": BUNDLED, "precision": "fp32", "token_input": "reject"},
    "late": {"name": BUNDLED},
    "half": {"name": BUNDLED, "precision": "bf16", "backend": "torch"},
}
"""Models of the `guarded` service, of which only `mini` and `strict` are loaded at startup."""

MANY_TEXTS = [f"{number} " + "word " * 254 for number in range(1000)]
"""256,000 tokens, which no machine embeds within the request timeout of the `strained` service."""


# --- requests -----------------------------------------------------------------------------------------


def call(service: Service, method: str, path: str, **headers: str | bytes) -> httpx.Response:
    """Send a request on a new connection, without the key of `service.http`.

    Underscores in the names of headers stand for hyphens.
    """
    encoded = [
        (name.replace("_", "-").encode(), value if isinstance(value, bytes) else value.encode("latin-1"))
        for name, value in headers.items()
    ]
    return httpx.request(method, f"{service.url}{path}", headers=encoded, trust_env=False, timeout=240)


def connect(service: Service) -> socket.socket:
    return socket.create_connection(("localhost", service.port), timeout=120)


@contextmanager
def busy(service: Service, inputs: int = len(MANY_TEXTS)) -> Iterator[None]:
    """Keep the `mini` model busy and its queue full, until the request timeout or the end of the block.

    The fewer inputs, the shorter is the Retry-After of other requests.
    """
    body = json.dumps({"model": "mini", "input": MANY_TEXTS[:inputs]}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with connect(service) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: service.figure("emb_provider_queue_tokens", model="mini") > 500)
        yield
    # The connection is closed, so that its queued inputs are dropped.
    wait_until(lambda: service.figure("emb_provider_queue_tokens", model="mini") == 0)


# --- models and vectors -------------------------------------------------------------------------------


def save_poisoned(directory: Path) -> Path:
    """Write a copy of the bundled model that returns NaN for `POISON`."""
    shutil.copytree(find_bundled(), directory)
    vocabulary = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    weights = load_file(directory / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][vocabulary[POISON]] = np.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine of each row of `left` with the same row of `right`."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    products: NDArray[np.float64] = (a * b).sum(axis=1)
    return products / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


# --- repositories and files ---------------------------------------------------------------------------


def small_repository(seed: int) -> dict[str, bytes]:
    """Return files that look like those of a model and are downloaded quickly. They cannot be loaded."""
    return {
        "config.json": json.dumps({"model_type": "bert", "hidden_size": seed}).encode(),
        "tokenizer.json": b'{"version": "1.0"}',
        "model.safetensors": random.Random(seed).randbytes(200_000),  # noqa: S311 - the same bytes each time
    }


def read_files(directory: Path) -> dict[str, bytes]:
    """Return the files of a directory as a repository."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def replace_with_pipe(job: dict[str, Any]) -> Path:
    """Replace the empty `notes.txt` of a downloaded model by a pipe, so that a process that reads it blocks."""
    pipe = Path(job["path"]) / "notes.txt"
    pipe.unlink()
    os.mkfifo(pipe)
    return pipe


@contextmanager
def blocked_reader(pipe: Path) -> Iterator[None]:
    """Wait until a process reads the pipe, and block it during the block; then replace the pipe by an empty file."""
    opened: list[int] = []

    def is_read() -> bool:
        try:
            opened.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # no process reads it yet
            return False
        return True

    wait_until(is_read)
    try:
        yield
    finally:
        # In this order, so that further readers find the file and do not block.
        pipe.unlink()
        pipe.touch()
        os.close(opened[0])


# --- management routes --------------------------------------------------------------------------------


def load(service: Service, name: str, **parameters: str) -> httpx.Response:
    return service.http.post("/api/models/load", params={"model_name": name, **parameters})


def unload(service: Service, name: str, **parameters: str) -> httpx.Response:
    return service.http.post("/api/models/unload", params={"model_name": name, **parameters})


def remove(service: Service, model_id: str, **parameters: str) -> httpx.Response:
    return service.http.delete(f"/api/models/cache/{model_id}", params=parameters)


def served_models(service: Service) -> dict[str, dict[str, Any]]:
    """Return the served models by alias."""
    response = service.http.get("/api/models")
    assert response.status_code == 200, response.text
    return {model["alias"]: model for model in response.json()["models"]}


def cached_models(service: Service, name: str) -> list[dict[str, Any]]:
    """Return the revisions of a model on disk."""
    response = service.http.get("/api/models/cache/list")
    assert response.status_code == 200, response.text
    return [model for model in response.json()["models"] if model["model_name"] == name]


def start_download(service: Service, name: str, **parameters: str) -> dict[str, Any]:
    """Start a download and return its job. By default nothing is compiled."""
    values = {"model_name": name, "compile": "false", **parameters}
    response = service.http.post("/api/models/download", params=values)
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    assert job["url"] == f"/api/models/jobs/{job['id']}"
    # Relative, and so right behind a proxy that adds a prefix to the paths.
    behind_proxy = httpx.URL("https://proxy.example/prefix/api/models/download")
    assert behind_proxy.join(response.headers["location"]).path == f"/prefix{job['url']}"
    return job


def get_job(service: Service, job: dict[str, Any]) -> dict[str, Any]:
    """Return the current state of a job."""
    response = service.http.get(job["url"])
    assert response.status_code == 200, response.text
    current: dict[str, Any] = response.json()
    return current


def wait_for_end(service: Service, job: dict[str, Any]) -> dict[str, Any]:
    """Wait until a job has ended, and return it."""
    wait_until(lambda: get_job(service, job)["state"] in ("done", "failed", "cancelled"))
    return get_job(service, job)


def download(service: Service, name: str, **parameters: str) -> dict[str, Any]:
    """Download a model, and return the job after it has succeeded."""
    job = wait_for_end(service, start_download(service, name, **parameters))
    assert job["state"] == "done", job
    return job


def assert_equal_answers(first: dict[str, Any], second: dict[str, Any]) -> None:
    """The vectors are equal except for rounding, and everything else is equal."""
    for left, right in zip(first.get("data", ()), second.get("data", ()), strict=True):
        one, other = as_vector(left.pop("embedding")), as_vector(right.pop("embedding"))
        tolerance = 0.05 if set(other) - {0, 1} else 0.3
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)
    assert first == second


def as_vector(value: str | list[float]) -> NDArray[np.float32]:
    """Return the values of an embedding of a response: base64 of float32, numbers, or eight bits in each number."""
    if isinstance(value, str):
        return np.frombuffer(base64.b64decode(value), dtype=np.float32)
    array = np.array(value)
    return array if array.dtype.kind == "f" else np.unpackbits(array.astype(np.int8).view(np.uint8)).astype(np.float32)
