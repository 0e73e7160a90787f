"""Properties of the image that are visible in the Dockerfile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from emb_model_provider.settings.loading import load_settings
from tests.container.dockerfile import ROOT, exec_form, final, stages, variables


def test_image_runs_as_an_unprivileged_user() -> None:
    """The user is a number, so that an orchestrator can see that it is not root."""
    user, _, group = final("USER").partition(":")
    assert int(user) >= 1000
    assert int(group) >= 1000


def test_all_files_are_written_to_the_volume() -> None:
    """Every path in the environment variables, except PATH, is on the volume."""
    volume = Path(final("VOLUME"))
    assert volume.is_absolute()
    paths = {name: Path(value) for name, value in variables().items() if value.startswith("/") and name != "PATH"}
    assert paths.pop("HOME") == volume
    assert all(path.is_relative_to(volume) for path in paths.values()), paths


@pytest.mark.parametrize("name", ["MODELSCOPE_CACHE", "HF_HUB_CACHE", "MODEL_CACHE_DIR"])
@pytest.mark.parametrize("source", ["-e", ".env"])
def test_variables_of_the_user_choose_the_cache(name: str, source: str, tmp_path: Path) -> None:
    """The variables of the image have no precedence over `docker run -e` or a mounted `.env`."""
    environment = variables()
    if source == "-e":
        environment[name] = "/models"
    else:
        (tmp_path / ".env").write_text(f"{name}=/models\n", encoding="utf-8")
    settings, _ = load_settings(tmp_path / ".env", environment)
    caches = {settings.hubs.modelscope_cache_dir, settings.hubs.hf_cache_dir} - {None}
    assert caches == {Path("/models")}


def test_service_listens_on_port_9000_of_all_interfaces() -> None:
    """The image declares the port."""
    environment = variables()
    assert environment["EMB_PROVIDER_HOST"] == "0.0.0.0"
    assert environment["EMB_PROVIDER_PORT"] == final("EXPOSE") == "9000"


def test_service_is_the_first_process_and_gets_sigterm() -> None:
    """No shell runs between the container engine and the service."""
    assert final("STOPSIGNAL") == "SIGTERM"
    assert exec_form("CMD") == ["python", "-m", "emb_model_provider.main"]
    assert exec_form("HEALTHCHECK")[0] == "python"


def test_healthcheck_ignores_the_port_of_a_kubernetes_service() -> None:
    """Kubernetes replaces EMB_PROVIDER_PORT by a URL in pods beside a service named emb-provider."""
    environment = os.environ | {"EMB_PROVIDER_PORT": "tcp://10.0.0.1:80"}
    command = [sys.executable, *exec_form("HEALTHCHECK")[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert "ValueError" not in done.stderr


def test_build_arguments_choose_torch_and_the_package_index() -> None:
    """The default is the CPU build of PyTorch, and no index is named, because uv knows where that build is."""
    arguments = [step.text for stage in stages() for step in stage if step.name == "ARG"]
    assert arguments == ["TORCH=cpu", "UV_DEFAULT_INDEX"]
    assert "://" not in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_dockerignore_allows_exactly_what_is_copied() -> None:
    """All other files are ignored."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = {
        source
        for stage in stages()
        for step in stage
        if step.name == "COPY" and not step.text.startswith("--from")
        for source in step.text.split()[:-1]
    }
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == copied


@pytest.mark.parametrize("port", ["{}", '"{}"', "'{}'"])
def test_healthcheck_asks_the_port_of_the_service(port: str) -> None:
    """Also in quotes, which `docker run --env-file` keeps and the service removes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    _, *arguments = exec_form("HEALTHCHECK")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environ = os.environ | {"EMB_PROVIDER_PORT": port.format(server.server_port)}
        assert subprocess.run([sys.executable, *arguments], env=environ, check=False, timeout=60).returncode == 0
        server.shutdown()
