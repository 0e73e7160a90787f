"""The real service answers with torch while a model is compiled, and without it afterwards."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest

from emb_model_provider.settings import FIDELITY_FLOORS
from tests.service import BUNDLED, Service, assert_error, wait_until

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEXTS = [f"{word} and {other}" for word in ("rain", "password", "天气", "invoice") for other in ("sun", "login")]


def vectors(service: Service) -> NDArray[np.float64]:
    response = service.embed(*TEXTS, model=BUNDLED)
    assert response.status_code == 200, response.text
    found = np.array([item["embedding"] for item in response.json()["data"]])
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def uses_torch(service: Service) -> bool:
    """Return whether the process of the service has loaded the library of torch."""
    return "libtorch" in Path(f"/proc/{service.process.pid}/maps").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the maps of Linux")
def test_compiled_model_takes_over_during_requests(tmp_path: Path) -> None:
    """No request fails, all vectors are within the floor of fp32, and the service never imports torch."""
    with Service(tmp_path, TORCH_WHILE_COMPILING="true") as service:
        service.wait()
        first = vectors(service)
        (model,) = service.http.get("/v1/models").json()["data"]
        assert (model["backend"], model["precision"]) == ("torch", "fp32")
        ready = service.http.get("/ready").json()["models"][BUNDLED]
        assert ready["state"] == "ready"
        assert " of 6 (" in ready["progress"]
        compiling = service.embed("hello", output_dtype="int8")
        assert_error(compiling, 503, "model_not_ready", param="model", type="server_error", phrase="being compiled")
        failures: list[str] = []
        lowest = [1.0]
        is_over = threading.Event()

        def ask() -> None:
            while not is_over.is_set():
                try:
                    lowest.append(float((vectors(service) * first).sum(axis=1).min()))
                except Exception as error:  # noqa: BLE001 - every failure counts
                    failures.append(str(error))
                    return

        clients = [threading.Thread(target=ask) for _ in range(2)]
        for client in clients:
            client.start()
        try:
            wait_until(lambda: service.http.get("/v1/models").json()["data"][0]["backend"] == "openvino", 560)
            wait_until(lambda: not psutil.Process(service.process.pid).children())
        finally:
            is_over.set()
            for client in clients:
                client.join()
        assert failures == []
        assert min(lowest) >= FIDELITY_FLOORS["fp32"]
        assert not uses_torch(service)
        assert service.embed("hello", output_dtype="int8").status_code == 200
        assert "progress" not in service.http.get("/ready").json()["models"][BUNDLED]
        service.stop()
    with Service(tmp_path / "again", TORCH_WHILE_COMPILING="true", CACHE_DIR=str(tmp_path / "cache")) as service:
        service.wait()
        assert float((vectors(service) * first).sum(axis=1).min()) >= FIDELITY_FLOORS["fp32"]
        assert not uses_torch(service)
        assert not [line for line in service.log_lines() if "torch" in line["message"]]


@pytest.mark.slow
def test_service_that_ends_takes_its_processes_with_it(tmp_path: Path) -> None:
    """Also if it is killed while torch serves and the compiler works."""
    with Service(tmp_path, TORCH_WHILE_COMPILING="true") as service:
        service.wait()
        children = psutil.Process(service.process.pid).children()
        assert len(children) == 2
        service.process.kill()
        service.process.wait()
        wait_until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))
