"""Who may call."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from emb_model_provider.api.errors import error_response, unauthorized

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.responses import Response

    from emb_model_provider.settings import ServerSettings


class Doorkeeper:
    """Checks the Host header of every request and the key of those that need one."""

    def __init__(self, settings: ServerSettings) -> None:
        self._keys = tuple(key.encode() for key in settings.api_keys)
        hosts = settings.allowed_hosts
        self._hosts = frozenset(map(_host_name, hosts)) if hosts is not None else None

    def wrong_host(self, headers: Headers) -> Response | None:
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

    def missing_key(self, path: str, headers: Headers) -> Response | None:
        """Return the answer to a request that needs a key and has none or a wrong one, or None."""
        if not self._keys or not (path == "/v1" or path.startswith("/v1/")):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            return unauthorized("You didn't provide an API key. Send it as 'Authorization: Bearer <key>'.")
        # All keys are compared, whichever fits, so that the time taken tells nothing. Header text is Latin-1.
        candidate = given.strip().encode("latin-1")
        matches = [hmac.compare_digest(candidate, key) for key in self._keys]
        return None if any(matches) else unauthorized("Incorrect API key provided.")


def _host_name(host: str) -> str:
    """Return a Host header without its port, IPv6 brackets removed."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host
