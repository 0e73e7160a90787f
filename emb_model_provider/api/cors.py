"""Which browser pages may call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.middleware.cors import CORSMiddleware

from emb_model_provider.api.auth import is_admin_path
from emb_model_provider.api.errors import error_response

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send


class Cors(CORSMiddleware):
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
        refusal = error_response(
            response.status_code,
            f"{reason}: let the operator add the page's origin to EMB_PROVIDER_CORS_ORIGINS."
            if "origin" in reason
            else f"{reason}.",
            code="cors_refused",
        )
        refusal.headers["vary"] = response.headers["vary"]
        return refusal
