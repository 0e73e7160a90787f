"""API keys, admin routes, allowed hosts, and pages of other origins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from starlette.datastructures import Headers

from emb_model_provider.api.auth import AccessPolicy
from emb_model_provider.settings import ServerSettings
from tests.api.helpers import KEYS, ORIGIN, SECRETS, call, connect
from tests.service import assert_error

if TYPE_CHECKING:
    from tests.service import Service

WRONG_KEYS = ["sk-wrong", KEYS[0] + "x", KEYS[0][:-1], KEYS[0].upper(), ",".join(KEYS).encode(), "\xe9\xff", "x" * 5000]
ADMIN_PATHS = ["/api", "/api/", "/api/models/load", "/%61pi/models", "/api//x"]
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
"""Headers of requests that come from this machine and not from a page of another origin."""
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
LOOPBACK_HOSTS = ["localhost", "LOCALHOST", "localhost:1", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:9000", "localhost.", "localhost.:9000", "app.localhost", "127.0.0.2", "0.0.0.0:9000", "[::]:9000", "[::ffff:127.0.0.1]", "[0:0:0:0:0:0:0:1]", "localhost:"]  # fmt: skip
WORK = [("POST", "/v1/embeddings"), ("POST", "/v3/embeddings"), ("POST", "/openai/deployments/x/embeddings"), ("POST", "/api/embed"), ("POST", "/api/embeddings"), ("POST", "/api/show"), ("GET", "/api/tags"), ("POST", "/"), ("POST", "/embed"), ("POST", "/similarity"), ("POST", "/tokenize"), ("POST", "/embedding"), ("POST", "/v1/embed"), ("POST", "/v2/embed"), ("GET", "/v1/models"), ("POST", "/no/such")]  # fmt: skip
"""Routes that need a key if keys are configured."""
REQUESTED_HEADERS = "authorization, content-type, x-stainless-os, x-stainless-retry-count, x-anything"


# --- keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Bearer "])
def test_each_configured_key_is_accepted(guarded: Service, scheme: str, key: str) -> None:
    """All configured keys are accepted, including those with non-ASCII characters."""
    response = call(guarded, "GET", "/v1/models", authorization=f"{scheme} {key}".encode())
    assert response.status_code == 200


@pytest.mark.parametrize("key", WRONG_KEYS, ids=lambda key: ascii(key[:12]))
def test_wrong_key_is_rejected(guarded: Service, key: str | bytes) -> None:
    """Keys that differ in one character, or are parts of a valid key, are rejected."""
    encoded = key if isinstance(key, bytes) else key.encode("latin-1")
    response = call(guarded, "GET", "/v1/models", authorization=b"Bearer " + encoded)
    assert_error(response, 401, "invalid_api_key", phrase="Incorrect API key provided.")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Basic c2s6c2s=", KEYS[0]])
def test_missing_key_is_rejected(guarded: Service, header: str | None) -> None:
    """The response to a request without a key says how to send one."""
    headers = {} if header is None else {"authorization": header}
    response = call(guarded, "GET", "/v1/models", **headers)
    assert_error(response, 401, "invalid_api_key", phrase="You didn't provide an API key.")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/embeddings"), ("GET", "/v1/models/mini"), ("GET", "/v1"), ("GET", "/v1/no/such"), ("DELETE", "/v1/models"), ("HEAD", "/v1/models")])  # fmt: skip
def test_every_path_under_v1_requires_a_key(guarded: Service, method: str, path: str) -> None:
    """Without a key it is not even visible which paths exist."""
    response = call(guarded, method, path)
    assert response.status_code == 401
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/docs", "/openapi.json"])
def test_monitoring_and_documentation_require_no_key(guarded: Service, path: str) -> None:
    """Monitoring and documentation are open."""
    assert call(guarded, "GET", path).status_code == 200


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer anything", "Basic xyz"])
def test_any_authorization_header_is_accepted_without_configured_keys(service: Service, header: str | None) -> None:
    """Clients that cannot omit the key can send any key."""
    headers = {} if header is None else {"authorization": header}
    assert call(service, "GET", "/v1/models", **headers).status_code == 200


def test_logs_contain_neither_keys_nor_inputs(guarded: Service) -> None:
    """Valid keys, wrong keys and inputs are not logged, whatever happens to the request."""
    secret = "a-text-that-nobody-else-may-read"
    call(guarded, "POST", "/v1/embeddings", authorization="Bearer sk-wrong-but-secret")
    guarded.embed(secret)
    guarded.embed(secret + " word" * 300, model="strict")
    guarded.embed([secret, None])
    guarded.embed("x", encoding_format=secret)
    guarded.post(f'{{"input": "{secret}'.encode())
    guarded.http.get("/v1/models", headers={"x-request-id": "after-secrets"})
    assert guarded.logged(request_id="after-secrets")
    for text in (guarded.log_text(), guarded.stderr_text()):
        assert "status=200" in text
        for hidden in (*KEYS, "sk-wrong", secret):
            assert hidden not in text


# --- admin routes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", DIRECT, ids=str)
def test_direct_local_request_is_admitted(service: Service, headers: dict[str, str]) -> None:
    """Without keys, a request from this machine gets past the access check, to a route that does not exist."""
    assert_error(call(service, "POST", "/api/x", **headers), 404, "unknown_url")


@pytest.mark.parametrize("headers", NOT_DIRECT, ids=str)
def test_proxies_and_pages_of_other_origins_are_rejected(service: Service, headers: dict[str, str]) -> None:
    """A proxy on this machine makes all its clients look local, and a page can make a local browser send requests."""
    response = call(service, "POST", "/api/models/load", **headers)
    assert_error(response, 403, "admin_only", phrase="EMB_PROVIDER_ADMIN_API_KEYS")


@pytest.mark.parametrize("path", ADMIN_PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "OPTIONS"])
def test_every_path_under_api_is_restricted(service: Service, method: str, path: str) -> None:
    """All spellings of the path and all methods are rejected in the same way."""
    assert call(service, method, path, x_forwarded_for="10.0.0.1").status_code == 403


def test_request_without_host_is_not_local(service: Service) -> None:
    """A request without a Host header is not admitted to admin routes."""
    with connect(service) as connection:
        connection.sendall(b"POST /api/x HTTP/1.0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 403 ")


def test_allowed_host_is_not_a_local_name(guarded: Service) -> None:
    """ALLOWED_HOSTS opens the service under a name, but not its admin routes."""
    headers = {"host": "emb.example", "authorization": f"Bearer {KEYS[0]}"}
    assert call(guarded, "GET", "/v1/models", **headers).status_code == 200
    assert_error(call(guarded, "POST", "/api/x", **headers), 403, "admin_only")


def test_local_request_requires_the_api_key(guarded: Service) -> None:
    """With API_KEYS and without ADMIN_API_KEYS, a local request also needs an API key."""
    assert_error(call(guarded, "POST", "/api/x"), 401, "invalid_api_key")
    assert_error(call(guarded, "POST", "/api/x", authorization="Bearer sk-wrong"), 401, "invalid_api_key")
    assert_error(call(guarded, "POST", "/api/x", authorization=f"Bearer {KEYS[0]}"), 404, "unknown_url")


def test_cors_does_not_apply_to_admin_routes(guarded: Service) -> None:
    """A page that is allowed to embed texts can neither call admin routes nor read their responses."""
    headers = {"origin": ORIGIN, "authorization": f"Bearer {KEYS[0]}"}
    preflight = call(guarded, "OPTIONS", "/api/x", access_control_request_method="POST", **headers)
    for response in (preflight, call(guarded, "POST", "/api/x", **headers)):
        assert_error(response, 403, "admin_only")
        assert not [name for name in response.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("headers", [{}, {"x_forwarded_for": "10.0.0.1"}, {"origin": "https://evil.example"}], ids=str)  # fmt: skip
def test_admin_key_admits_from_anywhere(impatient: Service, headers: dict[str, str]) -> None:
    """With ADMIN_API_KEYS, one of those keys is required and sufficient."""
    valid = f"Bearer {SECRETS['admin']}"
    assert_error(call(impatient, "POST", "/api/x", authorization=valid, **headers), 404, "unknown_url")
    assert_error(call(impatient, "POST", "/api/x", **headers), 401, "invalid_api_key")
    for wrong in ("Bearer x", valid + "x", valid[:-1], f"Basic {SECRETS['admin']}"):
        assert_error(call(impatient, "POST", "/api/x", authorization=wrong, **headers), 401, "invalid_api_key")


@pytest.mark.parametrize(
    ("peer", "status"),
    [("127.0.0.1", None), ("127.8.8.8", None), ("::1", None), ("::ffff:127.0.0.1", None), ("10.0.0.1", 403), ("::ffff:10.0.0.1", 403),
     ("172.17.0.1", 403), ("fe80::1%eth0", 403), ("0.0.0.0", 403), ("localhost", 403), ("", 403), (None, 403)],
)  # fmt: skip
def test_peer_must_be_loopback(peer: str | None, status: int | None) -> None:
    """The peer of the socket decides: the bridge of a container is not this machine, and no peer is not loopback."""
    scope = {"path": "/api/x", "client": (peer, 1234) if peer is not None else None}
    refusal = AccessPolicy(ServerSettings()).authorize(scope, Headers({"host": "localhost"}))
    assert (refusal.status_code if refusal is not None else None) == status


# --- hosts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", LOOPBACK_HOSTS)
def test_loopback_names_are_allowed_by_default(service: Service, host: str) -> None:
    """While it is bound to loopback, the service accepts every spelling of loopback, with any port; so do admin routes."""
    assert call(service, "GET", "/health", host=host).status_code == 200
    assert_error(call(service, "POST", "/api/x", host=host), 404, "unknown_url")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:9000", "localhost.evil.example", "127.0.0.1.evil.example", "::1.evil", "::1", "192.168.1.1", "localhost@evil", "localhost:evil", "localhost:80:80", "[::1]evil", "[::1", "[127.0.0.1]", "local host", "localhost..", ".localhost", "xlocalhost", "localhost,evil"])  # fmt: skip
@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("POST", "/v1/embeddings"), ("GET", "/docs")])
def test_other_hosts_are_rejected_on_every_route(service: Service, method: str, path: str, host: str) -> None:
    """A page that reaches loopback through its own host name (DNS rebinding) is rejected."""
    response = call(service, method, path, host=host)
    assert_error(response, 400, "host_not_allowed", phrase="EMB_PROVIDER_ALLOWED_HOSTS")


def test_rejected_host_is_named(service: Service) -> None:
    """With the setting that allows it, and keeps the names of this machine."""
    response = call(service, "GET", "/health", host="Embed.Example:9000")
    assert_error(
        response, 400, "host_not_allowed", phrase="EMB_PROVIDER_ALLOWED_HOSTS=localhost,127.0.0.1,embed.example"
    )


@pytest.mark.parametrize("lines", [b"Host: localhost\r\nHost: evil.example\r\n", b"Host: evil.example\r\nHost: localhost\r\n", b"Host: localhost\r\nHost: localhost\r\n"])  # fmt: skip
def test_several_hosts_are_rejected(service: Service, lines: bytes) -> None:
    """A proxy and the service could read different ones (RFC 9112, 3.2)."""
    with connect(service) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n" + lines + b"\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_configured_hosts_replace_the_default(guarded: Service) -> None:
    """Hosts in ALLOWED_HOSTS are accepted with any port, and others, even loopback addresses, are rejected."""
    assert call(guarded, "GET", "/health", host="emb.example").status_code == 200
    assert call(guarded, "GET", "/health", host="emb.example:1234").status_code == 200
    assert call(guarded, "GET", "/health", host="127.0.0.1").status_code == 400


# --- pages of other origins ---------------------------------------------------------------------------

FROM_PAGES = [headers for headers in NOT_DIRECT if {"origin", "sec-fetch-site"} & headers.keys()]


@pytest.mark.parametrize(("method", "path"), WORK)
def test_pages_cannot_make_the_service_work(service: Service, method: str, path: str) -> None:
    """A page can send a request although it cannot read the response (`no-cors`): nothing is computed for it."""
    for headers in FROM_PAGES:
        response = call(service, method, path, content_type="text/plain", **headers)
        assert response.status_code == 403, headers
        assert "EMB_PROVIDER_CORS_ORIGINS" in response.text


@pytest.mark.parametrize("headers", [{}, {"origin": "http://localhost:9000", "host": "localhost:9000"}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}], ids=str)  # fmt: skip
def test_programs_and_own_pages_are_answered(service: Service, headers: dict[str, str]) -> None:
    """Programs send no origin, and the page of /docs the service's own."""
    assert call(service, "GET", "/v1/models", **headers).status_code == 200


def test_link_of_another_page_can_be_followed(service: Service) -> None:
    """A browser shows the response to the user, not to the page with the link. A form that is sent is rejected."""
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert call(service, "GET", "/v1/models", **headers).status_code == 200
    assert_error(call(service, "POST", "/v1/embeddings", **headers), 403, "cors_refused")


@pytest.mark.parametrize(("origins", "origin", "status"), [((ORIGIN,), ORIGIN, None), ((ORIGIN,), ORIGIN.upper(), None), (("*",), "https://x.example", None), ((ORIGIN,), "https://x.example", 403), ((ORIGIN,), None, 403), (("null",), "null", None)])  # fmt: skip
def test_pages_of_allowed_origins_are_answered(
    origins: tuple[str, ...], origin: str | None, status: int | None
) -> None:
    """CORS_ORIGINS decides, also for requests that need no preflight."""
    scope = {"method": "POST", "path": "/v1/embeddings", "client": ("127.0.0.1", 1)}
    headers = {"host": "localhost", "sec-fetch-site": "cross-site"} | ({"origin": origin} if origin else {})
    refusal = AccessPolicy(ServerSettings(cors_origins=origins)).authorize(scope, Headers(headers))
    assert (refusal.status_code if refusal is not None else None) == status


# --- CORS ---------------------------------------------------------------------------------------------


def test_preflight_returns_the_requested_headers_without_a_key(guarded: Service) -> None:
    """A page of an allowed origin may send all headers that its SDK sends."""
    response = call(
        guarded, "OPTIONS", "/v1/embeddings", origin=ORIGIN, access_control_request_method="POST",
        access_control_request_headers=REQUESTED_HEADERS, access_control_request_private_network="true",
    )  # fmt: skip
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert response.headers["access-control-allow-headers"] == REQUESTED_HEADERS
    assert "POST" in response.headers["access-control-allow-methods"]
    assert response.headers["access-control-allow-private-network"] == "true"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("origin", "method", "setting"),
    [("https://evil.example", "POST", "EMB_PROVIDER_CORS_ORIGINS"), (ORIGIN, "DELETE", "")],
)
def test_rejected_preflight_has_openais_form(guarded: Service, origin: str, method: str, setting: str) -> None:
    """Preflights for other origins and methods are rejected with an error in OpenAI's form."""
    response = call(guarded, "OPTIONS", "/v1/embeddings", origin=origin, access_control_request_method=method)
    assert_error(response, 400, "cors_refused", phrase="Disallowed CORS")
    assert setting in response.json()["error"]["message"]
    assert "access-control-allow-origin" not in response.headers


def test_preflight_for_another_host_is_rejected(guarded: Service) -> None:
    """The Host header is checked before CORS."""
    response = call(
        guarded, "OPTIONS", "/v1/models", host="evil.example", origin=ORIGIN, access_control_request_method="GET"
    )
    assert_error(response, 400, "host_not_allowed")


@pytest.mark.parametrize("path", ["/v1/models", "/no/such"])
@pytest.mark.parametrize("key", [KEYS[0], "sk-wrong"])
def test_pages_can_read_responses_and_errors(guarded: Service, path: str, key: str) -> None:
    """All responses have the headers without which a browser does not show them to the page."""
    response = call(guarded, "GET", path, origin=ORIGIN, authorization=f"Bearer {key}")
    assert response.headers["access-control-allow-origin"] == ORIGIN
    exposed = response.headers["access-control-expose-headers"]
    assert {"x-request-id", "x-truncated-inputs", "retry-after"} <= set(exposed.split(", "))
    assert "Origin" in response.headers["vary"]


def test_pages_can_read_the_error_for_a_large_body(guarded: Service) -> None:
    """A 413 does not look like a network error to the page."""
    response = guarded.http.post("/v1/embeddings", content=b" " * 300_000, headers={"origin": ORIGIN})
    assert_error(response, 413, "request_too_large")
    assert response.headers["access-control-allow-origin"] == ORIGIN


def test_no_cors_headers_by_default(service: Service) -> None:
    """By default, pages of other origins can read nothing, and OPTIONS is an unknown method for programs."""
    response = call(service, "OPTIONS", "/v1/embeddings", origin=ORIGIN, access_control_request_method="POST")
    assert_error(response, 403, "cors_refused")
    assert "access-control-allow-origin" not in response.headers
    assert_error(call(service, "OPTIONS", "/v1/embeddings"), 405, "method_not_allowed")
    assert "access-control-allow-origin" not in call(service, "GET", "/health", origin=ORIGIN).headers
