"""Client of the running server: the management routes under /api, and the Batch API."""

from __future__ import annotations

from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from emb_model_provider.cli.output import ServerError
from emb_model_provider.error_table import FAILED, UNREACHABLE, USAGE_ERROR
from emb_model_provider.settings.hosts import is_loopback_host

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import httpx

    from emb_model_provider.settings import Settings

_CONNECT_TIMEOUT_S = 5.0
_LIST_TIMEOUT_S = 30.0
_USAGE_STATUSES = frozenset({400, 401, 403, 404, 409, 422})
"""Not taken from the table of errors, because the server may have another version and other error codes."""


class ServerClient:
    """Client of the server at a URL, else of the one in the settings. Its methods raise ServerError."""

    def __init__(self, settings: Settings, url: str | None = None, *, manages: bool = True) -> None:
        """Create a client for the management routes, or else for those of the API.

        Its key is the first of API_KEYS; for the management routes that of ADMIN_API_KEYS, if there is one.
        """
        server = settings.server
        self._has_own_url = url is not None
        self._url = (url or server.local_url).rstrip("/")
        keys = (*(server.accepted_admin_keys if manages else ()), *server.accepted_keys)
        # As bytes, because a key may contain non-ASCII characters.
        self._headers = {b"authorization": f"Bearer {keys[0]}".encode()} if keys else {}

    def models(self) -> dict[str, Any]:
        """Return the response of GET /api/models."""
        body = self.request("GET", "/api/models", timeout_s=_LIST_TIMEOUT_S)
        if not {"models", "process"} <= body.keys():  # other services have this route, too
            raise self._not_this_service(200)
        return body

    def request(
        self, method: str, path: str, *, timeout_s: float | None = None, **parameters: str | float | None
    ) -> dict[str, Any]:
        """Send a request, and wait for the response; without a timeout for as long as it takes."""
        return self._request(method, path, timeout_s, parameters)

    def post(self, path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Send a JSON object, and wait for the response."""
        return self._request("POST", path, json=fields)

    def upload(self, path: str, name: str, file: IO[bytes], fields: Mapping[str, str]) -> dict[str, Any]:
        """Send a form with a file, which is read while it is sent, and wait for the response."""
        return self._request("POST", path, files={"file": (name, file)}, data=fields)

    def download(self, path: str, to: IO[bytes]) -> None:
        """Write the content of a file of the server to a file."""
        with self._send("GET", path, None, {}) as response:
            if not response.is_success:
                response.read()
                self._read(response)
            for piece in response.iter_bytes():
                to.write(piece)

    def _request(
        self,
        method: str,
        path: str,
        timeout_s: float | None = None,
        parameters: Mapping[str, str | float | None] | None = None,
        **body: Any,
    ) -> dict[str, Any]:
        with self._send(method, path, timeout_s, parameters or {}, **body) as response:
            response.read()
            return self._read(response)

    @contextmanager
    def _send(
        self, method: str, path: str, timeout_s: float | None, parameters: Mapping[str, str | float | None], **body: Any
    ) -> Iterator[httpx.Response]:
        import httpx

        try:
            with httpx.stream(
                method,
                self._url + path,
                params={name: value for name, value in parameters.items() if value is not None},
                headers=self._headers,
                timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S),
                # A request through a proxy would not count as one from this machine.
                trust_env=not is_loopback_host(httpx.URL(self._url).host),
                **body,
            ) as response:
                yield response
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise ServerError(
                f"{self._url} is not the URL of a server ({error}). Write it as --url http://HOST:PORT.",
                exit_code=USAGE_ERROR,
            ) from error
        except httpx.LocalProtocolError:  # its message contains the key
            raise ServerError(
                "The first key of EMB_PROVIDER_ADMIN_API_KEYS (or EMB_PROVIDER_API_KEYS) contains a character that "
                "is not allowed in a header, such as a line break. Set it to a key of the server.",
                exit_code=USAGE_ERROR,
            ) from None
        except httpx.HTTPError as error:
            hint = "To start one: emb-provider serve. If it runs elsewhere, add --url URL."
            raise ServerError(
                f"No server answers at {self._url} ({str(error) or type(error).__name__}). "
                f"{'Check the URL.' if self._has_own_url else hint}",
                exit_code=UNREACHABLE,
            ) from error

    def _read(self, response: httpx.Response) -> dict[str, Any]:
        try:
            body = response.json()
        except ValueError:
            body = None
        if response.is_success and isinstance(body, dict):
            return body
        error = body.get("error") if isinstance(body, dict) else None
        if not isinstance(error, dict) or "message" not in error:
            raise self._not_this_service(response.status_code)
        message = str(error["message"])
        if response.status_code == 401:
            message += " Set EMB_PROVIDER_ADMIN_API_KEYS (or EMB_PROVIDER_API_KEYS) to a key of the server."
        if error.get("code") == "unknown_url":
            message += f" The server at {self._url} has another version. To start this one: emb-provider serve"
        exit_code = USAGE_ERROR if response.status_code in _USAGE_STATUSES else FAILED
        raise ServerError(message, exit_code=exit_code, code=str(error.get("code") or "failed"))

    def _not_this_service(self, status: int) -> ServerError:
        return ServerError(
            f"The program at {self._url} is not this service (HTTP {status}). Set the URL of the service with --url URL.",
            exit_code=UNREACHABLE,
        )
