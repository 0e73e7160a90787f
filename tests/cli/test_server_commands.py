"""ps, load, unload and rm --unload, against the real service; and against what is no service."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.cli.server_client import server_url
from emb_model_provider.settings import ServerSettings
from tests.cli.conftest import COPY
from tests.cli.running import asked, invoke
from tests.service import Service, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cli.conftest import Compiled
    from tests.hubs.servers import HuggingFaceServer

KEY = "operators-key"


@pytest.fixture(scope="module")
def service(compiled: Compiled) -> Iterator[Service]:
    """Yield a service that asks for a key and serves one small model, which is loaded when asked for."""
    settings = compiled.settings | {"PRELOAD_MODELS": "none", "ADMIN_API_KEYS": KEY}
    with Service(compiled.directory / "service", **settings) as started:
        yield started.wait("/health")


@pytest.fixture
def ours(service: Service, here: object, monkeypatch: pytest.MonkeyPatch) -> Service:
    """Give this process's settings the service's port and key."""
    monkeypatch.setenv("EMB_PROVIDER_PORT", str(service.port))
    monkeypatch.setenv("EMB_PROVIDER_ADMIN_API_KEYS", f"{KEY},another")
    return service


def state(alias: str = "small") -> str:
    found: str = next(one["state"] for one in asked("ps")["models"] if one["alias"] == alias)
    return found


def test_a_model_is_loaded_listed_and_unloaded(ours: Service) -> None:
    """Each command says what became of it; -q lists what is loaded; the table has the model's figures."""
    loaded = asked("load", "small")
    assert (loaded["alias"], loaded["state"]) == ("small", "ready")
    assert state() == "ready"
    assert invoke("ps", "-q").stdout == "small\n"
    head, line = invoke("ps").stdout.splitlines()
    assert head.split() == ["MODEL", "STATE", "PRECISION", "MEMORY", "QUEUE", "REQUESTS/S", "P95", "SERVED"]
    assert line.split()[:3] == ["small", "ready", "fp32"]
    assert invoke("unload", "small").stdout.startswith("small: unloaded")
    assert invoke("ps", "-q").stdout == ""


def test_rm_unload_lets_the_server_remove(ours: Service) -> None:
    """The server unloads the model, here one that was added by its name, and removes its files."""
    asked("load", COPY, "--alias", "added", "--source", "huggingface", "--precision", "fp32")
    assert state("added") == "ready"
    planned = asked("rm", "--unload", COPY, "--dry-run")
    assert [one["model_name"] for one in planned["models"]] == [COPY]
    assert state("added") == "ready"
    removed = asked("rm", "--unload", "-y", COPY)
    assert [one["model_name"] for one in removed["models"]] == [COPY]
    assert removed["unloaded"] == ["added"]


def test_what_the_server_refuses_ends_with_2(ours: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own words are on stderr; for a wrong key also what to set."""
    unknown = invoke("unload", "nothing")
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert "nothing" in unknown.stderr
    monkeypatch.setenv("EMB_PROVIDER_ADMIN_API_KEYS", "wrong")
    refused = invoke("ps")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "EMB_PROVIDER_ADMIN_API_KEYS" in refused.stderr
    assert "wrong" not in refused.stderr


def test_a_key_may_have_any_letters_and_is_never_shown(
    here: object, huggingface: HuggingFaceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is not ASCII is sent; one that no header can carry is a line that names the setting, without the key."""
    monkeypatch.setenv("EMB_PROVIDER_ADMIN_API_KEYS", "ключ")
    assert invoke("ps", "--url", huggingface.url).exit_code == 3  # no service of ours, but it was asked
    monkeypatch.setenv("EMB_PROVIDER_ADMIN_API_KEYS", "a-sec\nret")
    refused = invoke("ps", "--url", huggingface.url)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "EMB_PROVIDER_ADMIN_API_KEYS" in refused.stderr
    assert "sec" not in refused.stderr


@pytest.mark.parametrize("command", [("ps",), ("load", "x"), ("unload", "x"), ("rm", "x", "--unload", "-y")])
def test_out_of_reach_ends_with_3(
    command: tuple[str, ...], here: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address, and what to type."""
    monkeypatch.setenv("EMB_PROVIDER_PORT", str(free_port()))
    result = invoke(*command)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "emb-provider serve" in result.stderr


def test_another_program_there_is_told_from_ours(here: object, huggingface: HuggingFaceServer) -> None:
    """What answers, but is not this service, is out of reach, too; what is no address is a wrong usage."""
    result = invoke("ps", "--url", huggingface.url)
    assert result.exit_code == 3
    assert "is not this service" in result.stderr
    assert invoke("ps", "--url", "nonsense").exit_code == 2


def test_another_program_with_such_a_route_is_told_from_ours(here: object) -> None:
    """`GET /api/models` is answered by others, too: not in our form is not this service."""

    class Another(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": []}')

    with ThreadingHTTPServer(("127.0.0.1", 0), Another) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = invoke("ps", "--url", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert (result.exit_code, result.stdout) == (3, "")
    assert "is not this service" in result.stderr


def test_the_servers_address_follows_from_the_settings() -> None:
    """An address that means all of this machine's is asked at loopback."""
    found = [server_url(ServerSettings(host=host, port=1)) for host in ("0.0.0.0", "::", "::1", "localhost")]
    assert found == ["http://127.0.0.1:1", "http://[::1]:1", "http://[::1]:1", "http://localhost:1"]
