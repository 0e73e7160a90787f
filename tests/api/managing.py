"""What the tests of /api/models share: a hub to download from, and what is asked of a job."""

from __future__ import annotations

import json
import os
import random
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.service import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.service import Service

OVER = ("done", "failed", "cancelled")


def any_files(seed: int) -> dict[str, bytes]:
    """Return a repository that looks like a model's, and is quick to download: nothing can load it."""
    return {
        "config.json": json.dumps({"model_type": "bert", "hidden_size": seed}).encode(),
        "tokenizer.json": b'{"version": "1.0"}',
        "model.safetensors": random.Random(seed).randbytes(200_000),  # noqa: S311 (bytes that are the same each time)
    }


def files_in(directory: Path) -> dict[str, bytes]:
    """Return a directory as a repository."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def everything_in(directory: Path) -> list[str]:
    """Return all that lies in a directory, directories too."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def download(service: Service, name: str, **parameters: str) -> dict[str, Any]:
    """Begin a download; return the job."""
    response = service.http.post("/api/models/download", params={"model_name": name, **parameters})
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    assert response.headers["location"] == job["url"] == f"/api/models/jobs/{job['id']}"
    return job


def look(service: Service, job: dict[str, Any]) -> dict[str, Any]:
    """Return a job as it is now."""
    response = service.http.get(job["url"])
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def ended(service: Service, job: dict[str, Any]) -> dict[str, Any]:
    """Wait for a job to end, and return it."""
    wait_until(lambda: look(service, job)["state"] in OVER)
    return look(service, job)


def downloaded(service: Service, name: str, **parameters: str) -> dict[str, Any]:
    """Download a model, and return the job, which went well."""
    job = ended(service, download(service, name, **parameters))
    assert job["state"] == "done", job
    return job


def served(service: Service) -> dict[str, dict[str, Any]]:
    """Return the served models by alias."""
    response = service.http.get("/api/models")
    assert response.status_code == 200, response.text
    return {model["alias"]: model for model in response.json()["models"]}


def cached(service: Service, name: str) -> list[dict[str, Any]]:
    """Return what is on disk of a model, by its name."""
    response = service.http.get("/api/models/cache/list")
    assert response.status_code == 200, response.text
    return [model for model in response.json()["models"] if model["model_name"] == name]


def unreadable(job: dict[str, Any]) -> Path:
    """Make a pipe of the empty `notes.txt` of a model: who reads it waits until somebody has written it."""
    pipe = Path(job["path"]) / "notes.txt"
    pipe.unlink()
    os.mkfifo(pipe)
    return pipe


@contextmanager
def written(pipe: Path) -> Iterator[None]:
    """Have a pipe open for writing, once somebody reads it, and write nothing to it; in the end it is an empty file."""
    opened: list[int] = []

    def is_read() -> bool:
        try:
            opened.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # nobody does yet
            return False
        return True

    wait_until(is_read)
    try:
        yield
    finally:
        # Who comes from here on would wait for another writer.
        pipe.unlink()
        pipe.touch()
        os.close(opened[0])
