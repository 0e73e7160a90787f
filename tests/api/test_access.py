"""Who may call: keys, names of this host, and pages of other origins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from tests.api.models import KEYS, ORIGIN
from tests.service import assert_error

if TYPE_CHECKING:
    from tests.service import Service

WRONG = [
    "sk-wrong",
    KEYS[0] + "x",
    KEYS[0][:-1],
    KEYS[0].upper(),
    ",".join(KEYS).encode(),
    "\xe9\xff",
    "x" * 5000,
]


def call(service: Service, method: str, path: str, **headers: str | bytes) -> httpx.Response:
    """Send a request without the service's usual key; underscores in header names stand for hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    pairs = [
        (name.encode(), value if isinstance(value, bytes) else value.encode("latin-1"))
        for name, value in named.items()
    ]
    return httpx.request(method, f"{service.url}{path}", headers=pairs, trust_env=False, timeout=240)


# --- keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Bearer "])
def test_each_key_passes(guarded: Service, scheme: str, key: str) -> None:
    """All configured keys are good, also those that are not ASCII."""
    assert call(guarded, "GET", "/v1/models", authorization=f"{scheme} {key}".encode()).status_code == 200


@pytest.mark.parametrize("key", WRONG, ids=lambda key: ascii(key[:12]))
def test_wrong_key(guarded: Service, key: str | bytes) -> None:
    """Nearly right is wrong."""
    sent = key if isinstance(key, bytes) else key.encode("latin-1")
    response = call(guarded, "GET", "/v1/models", authorization=b"Bearer " + sent)
    assert_error(response, 401, "invalid_api_key", phrase="Incorrect API key provided.")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Basic c2s6c2s=", KEYS[0]])
def test_no_key(guarded: Service, header: str | None) -> None:
    """A request without a key says how one is sent."""
    headers = {} if header is None else {"authorization": header}
    response = call(guarded, "GET", "/v1/models", **headers)
    assert_error(response, 401, "invalid_api_key", phrase="You didn't provide an API key.")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/embeddings"), ("GET", "/v1/models/mini"), ("GET", "/v1"), ("GET", "/v1/no/such"), ("DELETE", "/v1/models"), ("HEAD", "/v1/models")])  # fmt: skip
def test_every_v1_path_asks_for_a_key(guarded: Service, method: str, path: str) -> None:
    """Under /v1 nothing is told without a key, not even what there is."""
    response = call(guarded, method, path)
    assert response.status_code == 401
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/docs", "/openapi.json"])
def test_watchers_need_no_key(guarded: Service, path: str) -> None:
    """What machines watch, and the documentation, are open."""
    assert call(guarded, "GET", path).status_code == 200


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer anything", "Basic xyz"])
def test_any_header_will_do_where_no_key_is_configured(service: Service, header: str | None) -> None:
    """Clients that cannot send no key send any."""
    headers = {} if header is None else {"authorization": header}
    assert call(service, "GET", "/v1/models", **headers).status_code == 200


def test_keys_and_texts_are_in_no_log(guarded: Service) -> None:
    """Neither good keys nor wrong ones nor inputs are logged, whatever happens to the request."""
    secret = "a-text-that-nobody-else-may-read"
    call(guarded, "POST", "/v1/embeddings", authorization="Bearer sk-wrong-but-secret")
    guarded.embed(secret)
    guarded.embed(secret + " word" * 300, model="half")
    guarded.embed([secret, None])
    guarded.embed("x", encoding_format=secret)
    guarded.post(f'{{"input": "{secret}'.encode())
    guarded.http.get("/v1/models", headers={"x-request-id": "after-secrets"})
    assert guarded.logged(request_id="after-secrets")
    for text in (guarded.log_text(), guarded.stderr_text()):
        assert "status=200" in text
        for hidden in (*KEYS, "sk-wrong", secret):
            assert hidden not in text


# --- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST", "localhost:1", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:9000"]
)
def test_loopback_names_by_default(service: Service, host: str) -> None:
    """Bound to loopback, the service answers to loopback's names, with any port."""
    assert call(service, "GET", "/health", host=host).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:9000", "localhost.evil.example", "127.0.0.1.evil.example", "::1.evil", "0.0.0.0", "192.168.1.1", "localhost@evil"])  # fmt: skip
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/health"), ("POST", "/v1/embeddings"), ("GET", "/docs")]
)
def test_other_names_are_refused_on_every_route(service: Service, method: str, path: str, host: str) -> None:
    """A page that was led here under a name of its own (DNS rebinding) gets nothing."""
    response = call(service, method, path, host=host)
    assert_error(response, 400, "host_not_allowed", phrase="EMB_PROVIDER_ALLOWED_HOSTS")


def test_names_that_the_operator_allowed(guarded: Service) -> None:
    """Configured names are answered, with any port, even if one was configured; no others are."""
    assert call(guarded, "GET", "/health", host="emb.example").status_code == 200
    assert call(guarded, "GET", "/health", host="emb.example:1234").status_code == 200
    assert call(guarded, "GET", "/health", host="127.0.0.1").status_code == 400


# --- pages --------------------------------------------------------------------------------------------

ASKED = "authorization, content-type, x-stainless-os, x-stainless-retry-count, x-anything"


def test_preflight_mirrors_the_headers_and_asks_for_no_key(guarded: Service) -> None:
    """A page of an allowed origin may send whatever headers its SDK sends."""
    response = call(
        guarded, "OPTIONS", "/v1/embeddings", origin=ORIGIN, access_control_request_method="POST",
        access_control_request_headers=ASKED, access_control_request_private_network="true",
    )  # fmt: skip
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert response.headers["access-control-allow-headers"] == ASKED
    assert "POST" in response.headers["access-control-allow-methods"]
    assert response.headers["access-control-allow-private-network"] == "true"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(("origin", "method"), [("https://evil.example", "POST"), (ORIGIN, "DELETE")])
def test_preflight_of_others_is_refused_in_our_form(guarded: Service, origin: str, method: str) -> None:
    """Other origins and methods are refused like everything else that is."""
    response = call(guarded, "OPTIONS", "/v1/embeddings", origin=origin, access_control_request_method=method)
    assert_error(response, 400, "cors_refused", phrase="Disallowed CORS")
    assert "access-control-allow-origin" not in response.headers


def test_preflight_under_another_name_is_refused(guarded: Service) -> None:
    """The name of this host is checked before anything else."""
    response = call(
        guarded,
        "OPTIONS",
        "/v1/models",
        host="evil.example",
        origin=ORIGIN,
        access_control_request_method="GET",
    )
    assert_error(response, 400, "host_not_allowed")


@pytest.mark.parametrize("path", ["/v1/models", "/no/such"])
@pytest.mark.parametrize("key", [KEYS[0], "sk-wrong"])
def test_pages_can_read_answers_and_errors(guarded: Service, path: str, key: str) -> None:
    """Answers, refusals and errors alike carry what a browser needs to show them to the page."""
    response = call(guarded, "GET", path, origin=ORIGIN, authorization=f"Bearer {key}")
    assert response.headers["access-control-allow-origin"] == ORIGIN
    exposed = response.headers["access-control-expose-headers"]
    assert {"x-request-id", "x-truncated-inputs", "retry-after"} <= set(exposed.split(", "))
    assert "Origin" in response.headers["vary"]


def test_too_large_a_body_can_be_read_by_a_page(guarded: Service) -> None:
    """413 is no network error to the page."""
    response = guarded.http.post("/v1/embeddings", content=b" " * 300_000, headers={"origin": ORIGIN})
    assert_error(response, 413, "request_too_large")
    assert response.headers["access-control-allow-origin"] == ORIGIN


def test_without_cors_no_page_is_let_in(service: Service) -> None:
    """By default no other origin may read anything, and a preflight is a method there is not."""
    response = call(service, "OPTIONS", "/v1/embeddings", origin=ORIGIN, access_control_request_method="POST")
    assert_error(response, 405, "method_not_allowed")
    assert "access-control-allow-origin" not in call(service, "GET", "/health", origin=ORIGIN).headers
