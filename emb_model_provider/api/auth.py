"""Access control: API keys, admin routes, allowed host names, and pages of other origins."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Literal

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse

from emb_model_provider.api.errors import error_response
from emb_model_provider.api.paths import (
    CONSOLE_SIGN_IN,
    is_admin_path,
    is_console_path,
    is_public_console_path,
    is_public_path,
)
from emb_model_provider.settings.hosts import is_loopback_address, is_loopback_host, parse_host

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from emb_model_provider.api.sessions import Sessions
    from emb_model_provider.settings import ServerSettings


_PROXY_HEADERS = frozenset({"forwarded", "x-real-ip", "via"})
"""Headers that proxies add, next to those that begin with `X-Forwarded`."""


_KEY_HEADERS = ("api-key", "x-api-key")
"""Headers in which clients of Azure and of other services send their key."""


SignIn = Literal["open", "key", "link"]
"""How a browser gets to the console. open: without a key. key: with a key. link: with the link that the start prints."""


class AccessPolicy:
    """Decides which requests are allowed, by their Host header, their API key, and where they come from."""

    def __init__(self, settings: ServerSettings, sessions: Sessions | None = None) -> None:
        """Create a policy. Without `sessions` there is no console."""
        self._sessions = sessions
        self.cookie = f"emb_provider_console_{settings.port}"
        """Name of the console's cookie. Cookies do not depend on the port, and one machine can run several services."""
        self._keys = tuple(key.encode() for key in settings.accepted_keys)
        self._names = dict(zip(self._keys, settings.key_names, strict=True))
        self._admin_keys = tuple(key.encode() for key in settings.accepted_admin_keys)
        self._origins = frozenset(map(str.lower, settings.cors_origins))
        self._checks_hosts, self._hosts = settings.checks_hosts, settings.accepted_hosts

    def check_host(self, headers: Headers) -> Response | None:
        """Return an error response if the Host header names another host, else None.

        This prevents DNS rebinding, where a page makes a browser call this service under the page's own host name.
        A browser always sends that name, so that a request without a Host header (HTTP/1.0, as simple health checks
        send it) is harmless.
        """
        if not self._checks_hosts or "host" not in headers:
            return None
        host = _host(headers)
        if host is not None and (host in self._hosts if self._hosts else is_loopback_host(host)):
            return None
        if host is None:
            message = "The Host header is not the name of one host, so that EMB_PROVIDER_ALLOWED_HOSTS cannot allow it."
        else:
            name = f"[{host}]" if ":" in host else host
            remedy = f"add {name} to EMB_PROVIDER_ALLOWED_HOSTS"
            if not self._hosts:
                remedy = f"set EMB_PROVIDER_ALLOWED_HOSTS=localhost,127.0.0.1,{name}"
            message = (
                f"This service does not answer requests to the host {name}. To allow it, the operator can {remedy}."
            )
        return error_response(400, message, code="host_not_allowed")

    def authorize(self, scope: Scope, headers: Headers) -> Response | None:
        """Return an error response if a request is not allowed or has no valid key, else None."""
        path = scope["path"]
        if self._sessions is not None and is_console_path(path):
            return self._authorize_console(scope, headers)
        if not is_admin_path(path):
            if is_public_path(scope["method"], path):
                return None
            return _check_key(headers, self._keys, _KEY_HEADERS) if self._keys else self._check_origin(scope, headers)
        return self._authorize_admin(scope, headers)

    @property
    def names_keys(self) -> bool:
        """Whether requests have keys, which have names."""
        return bool(self._keys)

    def key_name(self, headers: Headers) -> str:
        """Return the name of the valid key of a request, or an empty string."""
        names = [self._names[key] for key in self._keys if any(_matches(headers, (key,), _KEY_HEADERS))]
        return names[0] if names else ""

    def sign_in_with(self, scope: Scope, headers: Headers) -> SignIn:
        """Return how the browser that sends a request can get to the console."""
        if self._admin_keys:
            return "key"
        if not _is_direct_local(scope, headers):
            return "link"
        return "key" if self._keys else "open"

    def accepts_key(self, scope: Scope, headers: Headers, key: str) -> bool:
        """Return whether a key opens a session of the console. The same keys are accepted as on admin routes."""
        accepted = self._admin_keys or (self._keys if self.sign_in_with(scope, headers) == "key" else ())
        # All keys are compared, so that the time does not depend on which one matches.
        matches = [hmac.compare_digest(key.strip().encode("utf-8", "replace"), each) for each in accepted]
        return any(matches)

    def session_token(self, headers: Headers) -> str | None:
        """Return the token of the session that a request belongs to, or None."""
        token = cookie_parser(headers.get("cookie", "")).get(self.cookie)
        return token if token and self._sessions is not None and self._sessions.is_open(token) else None

    def _authorize_console(self, scope: Scope, headers: Headers) -> Response | None:
        is_read = scope["method"] in ("GET", "HEAD")
        if _is_cross_origin(headers) and not is_read:
            return error_response(
                403,
                "A page of another site, or of another port, cannot use the console. Open the console itself, and repeat "
                "it there.",
                code="cross_origin",
            )
        if is_public_console_path(scope["path"]):
            return None
        # Pages of other origins must not read the console either: SameSite cookies are sent by other ports of this host.
        if not _is_cross_origin(headers) and (
            self.session_token(headers) is not None or self._authorize_admin(scope, headers) is None
        ):
            return None
        if "hx-request" in headers:
            return error_response(401, "Sign in first.", code="signed_out", headers={"hx-redirect": CONSOLE_SIGN_IN})
        return RedirectResponse(CONSOLE_SIGN_IN, 303)

    def _authorize_admin(self, scope: Scope, headers: Headers) -> Response | None:
        if self._admin_keys:
            return _check_key(headers, self._admin_keys)
        if not _is_direct_local(scope, headers) or _is_cross_origin(headers):
            return error_response(
                403,
                "This route accepts only direct requests from the machine that the service runs on. To allow others, the "
                "operator can set EMB_PROVIDER_ADMIN_API_KEYS; send one of those keys.",
                code="admin_only",
            )
        return _check_key(headers, self._keys)

    def _check_origin(self, scope: Scope, headers: Headers) -> Response | None:
        """Return an error response if a page that is not allowed made a browser send the request, else None.

        CORS alone would only hide the response from the page, after the service has done the work.
        """
        if not _is_cross_origin(headers) or "*" in self._origins or headers.get("origin", "").lower() in self._origins:
            return None
        if scope["method"] in ("GET", "HEAD") and headers.get("sec-fetch-dest") == "document":
            return None  # a link that a user follows
        return error_response(
            403,
            "The request comes from a web page of another origin. To allow it, the operator can add the page's origin to "
            "EMB_PROVIDER_CORS_ORIGINS.",
            code="cors_refused",
        )


class CorsMiddleware(CORSMiddleware):
    """Starlette's middleware with the headers of OpenAI's clients, and with errors in OpenAI's form."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            # The operator has allowed the origin, even if it is a public site and this is a private network.
            allow_private_network=True,
            expose_headers=["x-request-id", "x-truncated-inputs", "retry-after"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # CORS_ORIGINS allows pages to embed texts, not to change the service.
        if scope["type"] == "http" and (is_admin_path(scope["path"]) or is_console_path(scope["path"])):
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        message = f"{bytes(response.body).decode()}."
        if "origin" in message:
            message += " The operator can add the page's origin to EMB_PROVIDER_CORS_ORIGINS."
        refusal = error_response(response.status_code, message, code="cors_refused")
        refusal.headers["vary"] = response.headers["vary"]
        return refusal


def _check_key(headers: Headers, keys: tuple[bytes, ...], more_headers: tuple[str, ...] = ()) -> Response | None:
    """Return an error response if no key is valid: a Bearer token, or the value of one of `more_headers`."""
    if not keys:
        return None
    if not any(_sent_keys(headers, more_headers)):
        message = "You didn't provide an API key. Send it as 'Authorization: Bearer <key>'."
    elif any(_matches(headers, keys, more_headers)):
        return None
    else:
        message = "Incorrect API key provided."
    return error_response(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _sent_keys(headers: Headers, more_headers: tuple[str, ...]) -> list[bytes]:
    """Return the keys of a request. Header text is Latin-1."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    sent = [value] if scheme.lower() == "bearer" else []
    sent += [headers.get(name, "") for name in more_headers]
    return [key.strip().encode("latin-1") for key in sent]


def _matches(headers: Headers, keys: tuple[bytes, ...], more_headers: tuple[str, ...]) -> list[bool]:
    """Compare all keys, so that the time does not depend on which one matches."""
    return [hmac.compare_digest(key, accepted) for key in _sent_keys(headers, more_headers) for accepted in keys]


def _is_direct_local(scope: Scope, headers: Headers) -> bool:
    """Return whether a request comes from this machine, not through a proxy, and under a loopback name.

    The name matters because a page can make a browser on this machine connect to loopback under the page's own name.
    """
    client = scope.get("client")
    if client is None or not is_loopback_address(client[0]):
        return False
    if any(name in _PROXY_HEADERS or name.startswith("x-forwarded") for name in headers):
        return False
    host = _host(headers)
    return host is not None and is_loopback_host(host)


def _is_cross_origin(headers: Headers) -> bool:
    """Return whether a page of another origin made a browser send a request. Ports of one host are different origins."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and origin.lower() != f"http://{headers.get('host', '')}".lower()


def _host(headers: Headers) -> str | None:
    """Return the host that a request names, without its port; None if there is none, an invalid one, or several."""
    values = headers.getlist("host")
    return parse_host(values[0]) if len(values) == 1 else None
