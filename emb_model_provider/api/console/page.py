"""What every page of the console needs: its request and language, the headers of its response, and its form of errors."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastapi import Depends
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from emb_model_provider.api.console.rendering import render
from emb_model_provider.api.console.sampler import Sampler
from emb_model_provider.api.console.texts import LANGUAGE_COOKIE, LANGUAGES, choose_language
from emb_model_provider.api.dependencies import Services, get_services
from emb_model_provider.api.errors import response_for
from emb_model_provider.api.paths import CONSOLE
from emb_model_provider.errors import RequestError
from emb_model_provider.settings.hosts import is_loopback_host, parse_host

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emb_model_provider.api.auth import AccessPolicy
    from emb_model_provider.api.console.texts import Language
    from emb_model_provider.api.sessions import Sessions

Form = TypeVar("Form", bound=BaseModel)

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    # Not no-referrer, with which browsers send the origin `null` in forms.
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}
_YEAR_S = 365 * 24 * 3600


class Console:
    """The parts of the console of one service."""

    def __init__(self, services: Services, policy: AccessPolicy, sessions: Sessions) -> None:
        self.policy = policy
        self.sessions = sessions
        self.sampler = Sampler(services)


class Page:
    """A request to the console, and its response."""

    def __init__(self, request: Request, services: Services, console: Console) -> None:
        self.request = request
        self.services = services
        self.console = console
        self.language: Language = choose_language(request)
        self.is_partial = "hx-request" in request.headers
        """Whether htmx replaces a part of the present page with the response."""

    def render(self, template: str, status: int = 200, **values: Any) -> Response:
        response = HTMLResponse(render(template, self.language, page=self, **values), status, HEADERS)
        if self.request.query_params.get("lang") in LANGUAGES:
            response.set_cookie(
                LANGUAGE_COOKIE, self.language, max_age=_YEAR_S, path=CONSOLE, samesite="strict", httponly=True
            )
        return response

    def redirect(self, path: str) -> Response:
        return RedirectResponse(path, 303, HEADERS)

    def error(self, error: Exception) -> Response:
        """Return the message of an error: as the notice of the present page, or as a page of its own."""
        failed = response_for(error)
        if not self.is_partial:
            return self.render("error.html", failed.status_code, message=failed.message)
        return self.notice("_notice.html", failed.status_code, message=failed.message)

    def notice(self, template: str, status: int = 200, **values: Any) -> Response:
        """Return a message for the top of the present page, whatever the request wanted to replace."""
        response = self.render(template, status, **values)
        response.headers["hx-retarget"] = "#notice"
        response.headers["hx-reswap"] = "innerHTML focusScroll:true"
        return response

    async def form(self) -> Mapping[str, str]:
        """Return the fields of the form that was sent. Fields without a value are left out."""
        body = (await self.request.body()).decode("utf-8", "replace")
        return {name: value.strip() for name, value in parse_qsl(body) if value.strip()}

    @property
    def path(self) -> str:
        path: str = self.request.scope["path"]
        return path

    @property
    def is_signed_in(self) -> bool:
        return self.console.policy.session_token(self.request.headers) is not None

    @property
    def has_batches(self) -> bool:
        return self.services.settings.batch_jobs.batches

    @property
    def service_url(self) -> str:
        """The URL under which the browser reaches this service.

        Behind a proxy with TLS only the browser knows the scheme. It sends Sec-Fetch-Site only over HTTPS, and to this
        machine.
        """
        headers = self.request.headers
        current = urlsplit(headers.get("hx-current-url", ""))
        host = headers.get("host", "localhost")
        if current.scheme in ("http", "https") and current.netloc == host:
            return f"{current.scheme}://{host}"
        is_secure = "sec-fetch-site" in headers and not is_loopback_host(parse_host(host) or "")
        return f"{'https' if is_secure else 'http'}://{host}"

    def in_language(self, language: Language) -> str:
        """Return the URL of this page in another language."""
        query = [(name, value) for name, value in self.request.query_params.multi_items() if name != "lang"]
        return f"{self.path}?{urlencode([*query, ('lang', language)])}"


def parse_form(kind: type[Form], fields: Mapping[str, str]) -> Form:
    """Check the fields of a form with the parameters of a management route. Other fields are ignored."""
    try:
        return kind.model_validate({name: value for name, value in fields.items() if name in kind.model_fields})
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        name = str(problem["loc"][0])
        if problem["type"] == "missing":
            raise RequestError(f"Missing required parameter: '{name}'.", param=name) from None
        raise RequestError(f"Invalid value for '{name}'. {problem['msg']}.", param=name) from None


def get_console(request: Request) -> Console:
    console: Console = request.app.state.console
    return console


def get_page(request: Request) -> Page:
    return Page(request, get_services(request), get_console(request))


PageDep = Annotated[Page, Depends(get_page)]


class ConsoleRoute(APIRoute):
    """A route whose errors are shown as HTML."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_with_errors(request: Request) -> Response:
            try:
                return await handle(request)
            except (HTTPException, ClientDisconnect):
                raise
            except Exception as error:  # noqa: BLE001 - `response_for` logs it
                return get_page(request).error(error)

        return handle_with_errors
