"""Who may change the service: the door of everything under /api."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import httpx
import pytest
from starlette.datastructures import Headers

from emb_model_provider.api.auth import AccessPolicy
from emb_model_provider.settings import ServerSettings
from tests.api.models import KEYS, ORIGIN, SECRETS
from tests.service import assert_error

if TYPE_CHECKING:
    from tests.service import Service

PATHS = ["/api", "/api/", "/api/models/load", "/%61pi/models", "/api//x"]
DIRECT: list[dict[str, str]] = [
    {},
    {"host": "LOCALHOST:1"},
    {"host": "127.0.0.1"},
    {"host": "[::1]:9000"},
    {"sec-fetch-site": "none"},
    {"sec-fetch-site": "same-origin", "origin": "http://localhost"},
    {"host": "localhost:9000", "origin": "http://localhost:9000"},
    {"authorization": "Bearer anything"},
]
NOT_DIRECT: list[dict[str, str]] = [
    {"forwarded": "for=127.0.0.1"},
    {"x-forwarded-for": "127.0.0.1"},
    {"X-Forwarded-Host": "localhost"},
    {"x-forwarded-proto": ""},
    {"x-real-ip": "127.0.0.1"},
    {"via": "1.1 proxy"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "same-site", "origin": "http://localhost"},
    {"sec-fetch-site": ""},
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://localhost:3000"},
    {"origin": "https://localhost"},
    {"host": "localhost:9000", "origin": "http://localhost"},
]


def call(service: Service, path: str, method: str = "POST", **headers: str) -> httpx.Response:
    """Send a request without the service's usual key, on a connection of its own."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.request(method, f"{service.url}{path}", headers=sent, trust_env=False, timeout=240)


@pytest.mark.parametrize("headers", DIRECT, ids=str)
def test_direct_local_caller_is_let_in(service: Service, headers: dict[str, str]) -> None:
    """Without keys, who calls from this machine is let in, and told that there is no such route."""
    assert_error(call(service, "/api/x", **headers), 404, "unknown_url")


@pytest.mark.parametrize("headers", NOT_DIRECT, ids=str)
def test_proxies_and_pages_are_kept_out(service: Service, headers: dict[str, str]) -> None:
    """A proxy on this machine makes everyone look local, and a page makes the operator's browser call."""
    response = call(service, "/api/models/load", **headers)
    assert_error(response, 403, "admin_only", phrase="EMB_PROVIDER_ADMIN_API_KEYS")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "OPTIONS"])
def test_everything_under_api_is_behind_the_door(service: Service, method: str, path: str) -> None:
    """However the path is written and whatever is asked, nothing is told to who may not ask."""
    assert call(service, path, method, x_forwarded_for="10.0.0.1").status_code == 403


def test_no_host_is_no_local_name(service: Service) -> None:
    """A request without a Host header is no direct one."""
    with socket.create_connection(("localhost", service.port), timeout=120) as connection:
        connection.sendall(b"POST /api/x HTTP/1.0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 403 ")


def test_name_that_is_answered_is_not_yet_a_local_one(guarded: Service) -> None:
    """ALLOWED_HOSTS opens the service under a name, not what changes it."""
    headers = {"host": "emb.example", "authorization": f"Bearer {KEYS[0]}"}
    assert call(guarded, "/v1/models", "GET", **headers).status_code == 200
    assert_error(call(guarded, "/api/x", **headers), 403, "admin_only")


def test_api_key_is_asked_for_too(guarded: Service) -> None:
    """Where callers need a key, local ones do here as well."""
    assert_error(call(guarded, "/api/x"), 401, "invalid_api_key")
    assert_error(call(guarded, "/api/x", authorization="Bearer sk-wrong"), 401, "invalid_api_key")
    assert_error(call(guarded, "/api/x", authorization=f"Bearer {KEYS[0]}"), 404, "unknown_url")


def test_cors_opens_nothing_here(guarded: Service) -> None:
    """A page that may embed texts may neither call these routes nor read what they say."""
    headers = {"origin": ORIGIN, "authorization": f"Bearer {KEYS[0]}"}
    preflight = call(guarded, "/api/x", "OPTIONS", access_control_request_method="POST", **headers)
    for response in (preflight, call(guarded, "/api/x", **headers)):
        assert_error(response, 403, "admin_only")
        assert not [name for name in response.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("headers", [{}, {"x_forwarded_for": "10.0.0.1"}, {"origin": "https://evil.example"}], ids=str)  # fmt: skip
def test_admin_key_is_what_counts_where_there_is_one(edge: Service, headers: dict[str, str]) -> None:
    """With ADMIN_API_KEYS one of those keys opens, from anywhere, and nothing else does."""
    good = f"Bearer {SECRETS['admin']}"
    assert_error(call(edge, "/api/x", authorization=good, **headers), 404, "unknown_url")
    assert_error(call(edge, "/api/x", **headers), 401, "invalid_api_key")
    for wrong in ("Bearer x", good + "x", good[:-1], f"Basic {SECRETS['admin']}"):
        assert_error(call(edge, "/api/x", authorization=wrong, **headers), 401, "invalid_api_key")


@pytest.mark.parametrize(
    ("peer", "status"),
    [("127.0.0.1", None), ("127.8.8.8", None), ("::1", None), ("::ffff:127.0.0.1", None), ("10.0.0.1", 403), ("::ffff:10.0.0.1", 403),
     ("172.17.0.1", 403), ("fe80::1%eth0", 403), ("0.0.0.0", 403), ("localhost", 403), ("", 403), (None, 403)],
)  # fmt: skip
def test_peer_must_be_this_machine(peer: str | None, status: int | None) -> None:
    """What counts is the socket's other end: a container's bridge is not this machine, and no peer is no proof."""
    scope = {"path": "/api/x", "client": (peer, 1234) if peer is not None else None}
    refusal = AccessPolicy(ServerSettings()).refusal(scope, Headers({"host": "localhost"}))
    assert (refusal.status_code if refusal is not None else None) == status
