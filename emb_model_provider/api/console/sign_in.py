"""`/console/sign-in` and `…/sign-out`: a key, or the link that the start prints, becomes a session."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from emb_model_provider.api.console.page import ConsoleRoute, Page, PageDep
from emb_model_provider.api.dependencies import get_record
from emb_model_provider.api.paths import CONSOLE, CONSOLE_SIGN_IN

router = APIRouter(route_class=ConsoleRoute, include_in_schema=False)


@router.get(CONSOLE_SIGN_IN)
async def show(page: PageDep) -> Response:
    token = page.request.query_params.get("token")
    # The record has the method that the client sent: in the scope, HEAD was replaced by GET.
    if token is not None and get_record(page.request).method == "GET":
        if page.console.sessions.redeem(token):
            return _open_session(page)
        return _form(page, 401, message="sign_in.used_link")
    return _form(page)


@router.post(CONSOLE_SIGN_IN)
async def sign_in(page: PageDep) -> Response:
    key = (await page.form()).get("key", "")
    if page.console.policy.accepts_key(page.request.scope, page.request.headers, key):
        return _open_session(page)
    return _form(page, 401, message="sign_in.wrong_key")


@router.post("/console/sign-out")
async def sign_out(page: PageDep) -> Response:
    policy = page.console.policy
    token = policy.session_token(page.request.headers)
    if token is not None:
        page.console.sessions.close(token)
    response = page.redirect(CONSOLE_SIGN_IN)
    response.delete_cookie(policy.cookie, path=CONSOLE)
    return response


def _form(page: Page, status: int = 200, message: str | None = None) -> Response:
    way = page.console.policy.sign_in_with(page.request.scope, page.request.headers)
    return page.render("sign_in.html", status, way=way, message=message)


def _open_session(page: Page) -> Response:
    response = page.redirect(CONSOLE)
    response.set_cookie(
        page.console.policy.cookie,
        page.console.sessions.open(),
        path=CONSOLE,
        httponly=True,
        samesite="strict",
        # Browsers ignore a secure cookie that comes over plain HTTP. Behind a proxy with TLS, only they know the scheme.
        secure=page.request.headers.get("origin", "").startswith("https://"),
    )
    return response
