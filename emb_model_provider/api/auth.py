"""Who may call."""

from __future__ import annotations

import hmac
import ipaddress
from typing import TYPE_CHECKING

from starlette.middleware.cors import CORSMiddleware

from emb_model_provider.api.errors import error_response, unauthorized

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from emb_model_provider.settings import ServerSettings


_TRACES_OF_PROXIES = frozenset({"forwarded", "x-real-ip", "via"})


def is_admin_path(path: str) -> bool:
    """Whether what lies at this path (percent-decoded) may change the service."""
    return path == "/api" or path.startswith("/api/")


class AccessPolicy:
    """Checks the Host header of every request, the key of those that need one, and who may change the service."""

    def __init__(self, settings: ServerSettings) -> None:
        self._keys = tuple(key.encode() for key in settings.accepted_keys)
        self._admin_keys = tuple(key.encode() for key in settings.accepted_admin_keys)
        hosts = settings.accepted_hosts
        self._hosts = frozenset(map(_host_name, hosts)) if hosts is not None else None

    def check_host(self, headers: Headers) -> Response | None:
        """Return the answer to a request under a name that is not ours, or None.

        A browser that was lured here by a DNS name of the attacker's always sends that name, so a request
        without a Host header (HTTP/1.0, as plain health checks send) is harmless.
        """
        if self._hosts is None:
            return None
        host = headers.get("host")
        if not host or _host_name(host) in self._hosts:
            return None
        return error_response(
            400,
            "This Host header is not answered here: let the operator add it to EMB_PROVIDER_ALLOWED_HOSTS.",
            code="host_not_allowed",
        )

    def authorize(self, scope: Scope, headers: Headers) -> Response | None:
        """Return the answer to a request that may not be made, or that lacks its key; None to let it pass."""
        path = scope["path"]
        if is_admin_path(path):
            return self._refusal_of_admin(scope, headers)
        if self._keys and (path == "/v1" or path.startswith("/v1/")):
            return _missing_key(headers, self._keys)
        return None

    def _refusal_of_admin(self, scope: Scope, headers: Headers) -> Response | None:
        if self._admin_keys:
            return _missing_key(headers, self._admin_keys)
        if not (_is_direct_local(scope, headers) and _is_own_page_or_none(headers)):
            return error_response(
                403,
                "This route answers only direct callers on the service's own machine. To call it from elsewhere, let "
                "the operator set EMB_PROVIDER_ADMIN_API_KEYS, and send one of those keys.",
                code="admin_only",
            )
        return _missing_key(headers, self._keys) if self._keys else None


def _missing_key(headers: Headers, keys: tuple[bytes, ...]) -> Response | None:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given.strip():
        return unauthorized("You didn't provide an API key. Send it as 'Authorization: Bearer <key>'.")
    # All keys are compared, whichever fits, so that the time taken tells nothing. Header text is Latin-1.
    candidate = given.strip().encode("latin-1")
    matches = [hmac.compare_digest(candidate, key) for key in keys]
    return None if any(matches) else unauthorized("Incorrect API key provided.")


def _is_direct_local(scope: Scope, headers: Headers) -> bool:
    """Whether the peer is this machine, was not sent by a proxy on it, and calls us by one of its own names.

    The name matters because a page can make the operator's browser connect to loopback under the page's own name.
    """
    client = scope.get("client")
    if client is None or not _is_loopback(client[0]):
        return False
    if any(name in _TRACES_OF_PROXIES or name.startswith("x-forwarded") for name in headers):
        return False
    host = _host_name(headers.get("host", ""))
    return host == "localhost" or _is_loopback(host)


def _is_own_page_or_none(headers: Headers) -> bool:
    """Whether no page of another site made a browser send this. Ports of one host are different origins."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is None or origin.lower() == f"http://{headers.get('host', '')}".lower()


def _is_loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def _host_name(host: str) -> str:
    """Return a Host header without its port, IPv6 brackets removed."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


class CorsMiddleware(CORSMiddleware):
    """Starlette's, with the headers that the OpenAI API's clients send and read, and refusals in OpenAI's form."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            # The operator named the origin: that it is outside this network is no reason to refuse it.
            allow_private_network=True,
            expose_headers=["x-request-id", "x-truncated-inputs", "retry-after"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Pages may embed texts where the operator lets them; what changes the service is not for them.
        if scope["type"] == "http" and is_admin_path(scope["path"]):
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        reason = bytes(response.body).decode()
        authorize = error_response(
            response.status_code,
            f"{reason}: let the operator add the page's origin to EMB_PROVIDER_CORS_ORIGINS."
            if "origin" in reason
            else f"{reason}.",
            code="cors_refused",
        )
        authorize.headers["vary"] = response.headers["vary"]
        return authorize
