"""`ps`, `load`, `unload` and `rm --unload`, with the real service and with other programs."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.settings import ServerSettings
from tests.cli.conftest import COPY
from tests.cli.helpers import invoke, invoke_json
from tests.service import Service, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cli.conftest import Compiled
    from tests.hubs.servers import HuggingFaceServer

KEY = "operators-key"


@pytest.fixture(scope="module")
def service(compiled: Compiled) -> Iterator[Service]:
    """Yield a service that requires a key, and loads its model on request."""
    settings = compiled.settings | {"PRELOAD_MODELS": "none", "ADMIN_API_KEYS": KEY}
    with Service(compiled.directory / "service", **settings) as started:
        yield started.wait("/health")


@pytest.fixture
def ours(service: Service, here: object, monkeypatch: pytest.MonkeyPatch) -> Service:
    """Set port and key of the service in the settings of this process."""
    monkeypatch.setenv("EMB_PROVIDER_PORT", str(service.port))
    monkeypatch.setenv("EMB_PROVIDER_ADMIN_API_KEYS", f"{KEY},another")
    return service


@contextlib.contextmanager
def fake_server(body: object, *, status: int = 200, post_s: float = 0.0) -> Iterator[str]:
    """Yield the URL of a server that gives every request the same response, POST requests after `post_s` seconds."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_POST(self) -> None:
            time.sleep(post_s)
            self.do_GET()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def state_of(alias: str) -> str:
    state: str = next(model["state"] for model in invoke_json("ps")["models"] if model["alias"] == alias)
    return state


def test_a_model_is_loaded_listed_and_unloaded(ours: Service) -> None:
    loaded = invoke_json("load", "small")
    assert (loaded["alias"], loaded["state"]) == ("small", "ready")
    assert state_of("small") == "ready"
    assert invoke("ps", "-q").stdout == "small\n"
    head, line = invoke("ps").stdout.splitlines()
    assert head.split() == ["MODEL", "STATE", "PRECISION", "MEMORY", "QUEUE", "REQUESTS/S", "P95", "SERVED"]
    assert line.split()[:3] == ["small", "ready", "fp32"]
    assert invoke("unload", "small").stdout.startswith("small: unloaded")
    assert invoke("ps", "-q").stdout == ""


def test_rm_unload_lets_the_server_remove_a_model(ours: Service) -> None:
    """Also one that was loaded by its name and is not in the settings."""
    invoke_json("load", COPY, "--alias", "added", "--source", "huggingface", "--precision", "fp32")
    assert state_of("added") == "ready"
    planned = invoke_json("rm", "--unload", COPY, "--dry-run")
    assert [model["model_name"] for model in planned["models"]] == [COPY]
    assert state_of("added") == "ready"
    removed = invoke_json("rm", "--unload", "-y", COPY)
    assert [model["model_name"] for model in removed["models"]] == [COPY]
    assert removed["unloaded"] == ["added"]


def test_a_refused_request_exits_with_2(ours: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message of the server is on stderr; for a wrong key also which setting to change."""
    unknown = invoke("unload", "nothing")
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert "nothing" in unknown.stderr
    monkeypatch.setenv("EMB_PROVIDER_ADMIN_API_KEYS", "wrong")
    refused = invoke("ps")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "EMB_PROVIDER_ADMIN_API_KEYS" in refused.stderr
    assert "wrong" not in refused.stderr


def test_a_key_is_never_printed(here: object, huggingface: HuggingFaceServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is not ASCII is sent. For one that is not allowed in a header, the error names the setting."""
    monkeypatch.setenv("EMB_PROVIDER_ADMIN_API_KEYS", "ключ")
    assert invoke("ps", "--url", huggingface.url).exit_code == 3  # sent to a program that is not the service
    assert huggingface.requests
    monkeypatch.setenv("EMB_PROVIDER_ADMIN_API_KEYS", "a-sec\nret")
    refused = invoke("ps", "--url", huggingface.url)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "EMB_PROVIDER_ADMIN_API_KEYS" in refused.stderr
    assert "sec" not in refused.stderr


@pytest.mark.parametrize("command", [("ps",), ("load", "x"), ("unload", "x"), ("rm", "x", "--unload", "-y")])
def test_a_server_that_cannot_be_reached_exits_with_3(
    command: tuple[str, ...], here: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("EMB_PROVIDER_PORT", str(port))
    result = invoke(*command)
    assert (result.exit_code, result.stdout) == (3, "")
    assert f"http://localhost:{port}" in result.stderr
    assert "emb-provider serve" in result.stderr


def test_another_program_exits_with_3(here: object, huggingface: HuggingFaceServer) -> None:
    result = invoke("ps", "--url", huggingface.url)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "is not this service" in result.stderr


def test_another_program_with_the_same_route_exits_with_3(here: object) -> None:
    """Its response lacks the fields of `GET /api/models`."""
    with fake_server({"data": []}) as url:
        result = invoke("ps", "--url", url)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "is not this service" in result.stderr


@pytest.mark.parametrize(("status", "exit_code"), [(400, 2), (409, 2), (429, 1), (503, 1)])
def test_the_exit_code_depends_on_the_status(status: int, exit_code: int, here: object) -> None:
    with fake_server({"error": {"message": "The server is full."}}, status=status) as url:
        result = invoke("ps", "--url", url)
    assert (result.exit_code, result.stdout, result.stderr) == (exit_code, "", "Error: The server is full.\n")


def test_a_server_of_another_version_is_named(here: object) -> None:
    body = {"error": {"message": "Unknown URL.", "code": "unknown_url"}}
    with fake_server(body, status=404) as url:
        result = invoke("ps", "--url", url)
    assert result.exit_code == 2
    assert f"The server at {url} has another version." in result.stderr


def test_load_shows_the_state_of_the_model(here: object) -> None:
    """Each phase once, while the server has not answered, also if another alias of the same model has another state."""
    models = [
        {"alias": "x", "model_name": "a/x", "state": "compiling"},
        {"alias": "y", "model_name": "x", "state": "loading"},
    ]
    with fake_server({"alias": "x", "state": "ready", "models": models, "process": {}}, post_s=2.5) as url:
        result = invoke("load", "x", "--url", url, "--progress", "plain")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "x: ready\n", "x: compile\n")


@pytest.mark.parametrize("url", ["nonsense", "http://[::1"])
def test_an_invalid_url_exits_with_2(url: str, here: object) -> None:
    result = invoke("ps", "--url", url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--url http://HOST:PORT" in result.stderr


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:1"),
        ("::", "http://127.0.0.1:1"),
        ("*", "http://127.0.0.1:1"),
        ("[::1]", "http://[::1]:1"),
        ("10.0.0.1, localhost", "http://localhost:1"),
        ("fd00::1", "http://[fd00::1]:1"),
        ("::1", "http://[::1]:1"),
        ("localhost", "http://localhost:1"),
    ],
)
def test_the_default_url_is_local(host: str, url: str) -> None:
    """A server that listens on all addresses is reached at the loopback address."""
    assert ServerSettings(host=host, port=1).local_url == url
