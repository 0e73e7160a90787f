"""The running server, as the shell speaks to it: the routes under /api that its operator may call."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from emb_model_provider.cli.output import ServerRefusedError, ServerUnreachableError
from emb_model_provider.error_table import FAILED, USAGE_ERROR

if TYPE_CHECKING:
    from emb_model_provider.settings import ServerSettings, Settings

_CONNECT_S = 5.0
_ANSWER_S = 30.0
_ASKED_WRONGLY = frozenset({400, 401, 403, 404, 409, 422})
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "*": "127.0.0.1"}  # noqa: S104 - what is listened at, not listening


def server_url(server: ServerSettings) -> str:
    """Return where a server with these settings can be asked from its own machine."""
    host = _EVERYWHERE.get(server.host, server.host)
    return f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"


class ServerClient:
    """Asks one server. The key is the first of ADMIN_API_KEYS, else the first of API_KEYS."""

    def __init__(self, settings: Settings, url: str | None = None) -> None:
        server = settings.server
        self.url = (url or server_url(server)).rstrip("/")
        self._given = url is not None
        keys = (*server.accepted_admin_keys, *server.accepted_keys)
        # As bytes: a key may have letters that are not ASCII.
        self._headers = {b"authorization": f"Bearer {keys[0]}".encode()} if keys else {}

    def models(self) -> dict[str, Any]:
        """Return what GET /api/models answers.

        Raises: OutOfReachError, RefusedError.
        """
        answer = self._ask("GET", "/api/models", {}, _ANSWER_S)
        if not {"models", "process"} <= answer.keys():  # other services have this route, too
            raise self._another(200)
        return answer

    def post(self, path: str, **parameters: object) -> dict[str, Any]:
        """Ask for something that may take as long as it takes.

        Raises: OutOfReachError, RefusedError.
        """
        return self._ask("POST", path, parameters, None)

    def delete(self, path: str, **parameters: object) -> dict[str, Any]:
        """Raises: OutOfReachError, RefusedError."""
        return self._ask("DELETE", path, parameters, None)

    def _ask(
        self, method: str, path: str, parameters: dict[str, object], timeout_s: float | None
    ) -> dict[str, Any]:
        import httpx

        query = {name: _written(value) for name, value in parameters.items() if value is not None}
        try:
            answer = httpx.request(
                method,
                self.url + path,
                params=query,
                headers=self._headers,
                timeout=httpx.Timeout(timeout_s, connect=_CONNECT_S),
                # A proxy of the environment is not for this machine, and would be no direct local caller.
                trust_env=not _is_loopback(self.url),
            )
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise ServerRefusedError(
                f"{self.url} is no address of a server ({error}): write --url http://HOST:PORT.",
                status=USAGE_ERROR,
            ) from error
        except httpx.LocalProtocolError:  # its words would show the key
            raise ServerRefusedError(
                "The first of EMB_PROVIDER_ADMIN_API_KEYS (or EMB_PROVIDER_API_KEYS) holds a character that no header "
                "can carry, such as a line break: write the server's key there as it is.",
                status=USAGE_ERROR,
            ) from None
        except httpx.HTTPError as error:
            raise ServerUnreachableError(self._unreachable(error)) from error
        return self._read(answer)

    def _unreachable(self, error: Exception) -> str:
        reason = str(error) or type(error).__name__
        hint = (
            "Check the address."
            if self._given
            else "Start one: emb-provider serve. Or say where it is: --url URL."
        )
        return f"No server answers at {self.url} ({reason}). {hint}"

    def _another(self, status: int) -> ServerUnreachableError:
        return ServerUnreachableError(
            f"What answers at {self.url} is not this service (HTTP {status}). Say where the service is: --url URL."
        )

    def _read(self, answer: Any) -> dict[str, Any]:
        """Return the body of a good answer; of any other raise what it says."""
        try:
            body = answer.json()
        except ValueError:
            body = None
        if answer.is_success and isinstance(body, dict):
            return body
        error = body.get("error") if isinstance(body, dict) else None
        if not isinstance(error, dict) or "message" not in error:
            raise self._another(answer.status_code)
        message = str(error["message"])
        if answer.status_code == 401:
            message += (
                " Set EMB_PROVIDER_ADMIN_API_KEYS (or EMB_PROVIDER_API_KEYS) here to a key of the server's."
            )
        if error.get("code") == "unknown_url":
            message += f" The server at {self.url} is of another version: start this one, emb-provider serve."
        status = USAGE_ERROR if answer.status_code in _ASKED_WRONGLY else FAILED
        raise ServerRefusedError(message, status=status)


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
