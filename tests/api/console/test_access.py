"""Who may use the console: the rules of the admin routes, sessions, the one-time link, and pages of other origins."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.api.sessions import IDLE_S, Sessions
from tests.api.console.conftest import REMOTE, Open
from tests.api.test_auth import NOT_DIRECT
from tests.service import Service

if TYPE_CHECKING:
    from pathlib import Path

ADMIN, KEY = "an-admin-key", "an-api-key-ü"
PAGES = ["/console", "/console/models", "/console/cache", "/console/playground", "/console/settings"]
CHANGES = [
    "/console/models/download",
    "/console/models/cancel",
    "/console/models/load",
    "/console/models/unload",
    "/console/cache/remove",
    "/console/cache/prune",
    "/console/playground",
    "/console/settings/checks",
    "/console/sign-in",
    "/console/sign-out",
]
FOREIGN: list[dict[str, str]] = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://localhost:3000"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
]
"""Headers of requests from pages of other origins."""


@pytest.mark.parametrize("path", PAGES)
async def test_a_direct_local_browser_needs_no_key(open_console: Open, path: str) -> None:
    async with open_console() as (client, _):
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("headers", NOT_DIRECT, ids=str)
async def test_others_are_sent_to_the_form(open_console: Open, headers: dict[str, str]) -> None:
    async with open_console() as (client, _):
        response = await client.get("/console/models", headers=headers)
        assert (response.status_code, response.headers["location"]) == (303, "/console/sign-in")
        response = await client.get("/console/models", headers={**headers, "hx-request": "true"})
        assert (response.status_code, response.headers["hx-redirect"]) == (401, "/console/sign-in")


async def test_every_path_below_the_console_is_guarded(open_console: Open) -> None:
    async with open_console(REMOTE, admin_api_keys=ADMIN) as (client, _):
        for path in [*PAGES, "/console/", "/console/live", "/console/nothing", "/console/models/state"]:
            assert (await client.get(path)).headers["location"] == "/console/sign-in", path


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@pytest.mark.parametrize("path", CHANGES)
async def test_pages_of_other_origins_change_nothing(open_console: Open, path: str, headers: dict[str, str]) -> None:
    """Not even with the cookie of a session, which other ports of this host send."""
    async with open_console(admin_api_keys=ADMIN) as (client, _):
        await client.post("/console/sign-in", data={"key": ADMIN})
        assert (await client.get("/console/models")).status_code == 200
        response = await client.post(path, headers=headers)
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "cross_origin"


async def test_a_key_opens_a_session(open_console: Open) -> None:
    """The key becomes a random cookie that scripts cannot read and other sites cannot use."""
    async with open_console(REMOTE, admin_api_keys=f"other,{ADMIN}") as (client, _):
        assert 'type="password"' in (await client.get("/console/sign-in")).text
        response = await client.post("/console/sign-in", data={"key": ADMIN})
        assert (response.status_code, response.headers["location"]) == (303, "/console")
        cookie = response.headers["set-cookie"]
        assert re.fullmatch(r"emb_provider_console_9000=[\w-]{43}; HttpOnly; Path=/console; SameSite=strict", cookie)
        assert ADMIN not in cookie
        assert (await client.get("/console")).status_code == 200


async def test_behind_tls_the_cookie_is_secure(open_console: Open) -> None:
    async with open_console(REMOTE, host="emb.example", admin_api_keys=ADMIN, allowed_hosts="*") as (client, _):
        headers = {"origin": "https://emb.example", "sec-fetch-site": "same-origin"}
        response = await client.post("/console/sign-in", data={"key": ADMIN}, headers=headers)
        assert "; Secure" in response.headers["set-cookie"]


@pytest.mark.parametrize(
    "key", ["", "wrong", ADMIN[:-1], KEY, "\ud800".encode("utf-16-le", "surrogatepass").decode("latin-1")]
)
async def test_a_wrong_key_opens_none(open_console: Open, key: str) -> None:
    """Neither does a key for embeddings, if there are admin keys."""
    async with open_console(api_keys=KEY, admin_api_keys=ADMIN) as (client, _):
        response = await client.post("/console/sign-in", data={"key": key})
        assert response.status_code == 401
        assert "set-cookie" not in response.headers
        assert "This key is not valid." in response.text


async def test_a_key_for_embeddings_is_accepted_on_this_machine_only(open_console: Open) -> None:
    """As on the admin routes, if there are no admin keys."""
    async with open_console(api_keys=KEY) as (client, _):
        assert (await client.get("/console")).status_code == 303
        assert (await client.post("/console/sign-in", data={"key": KEY})).headers["location"] == "/console"
    async with open_console(REMOTE, api_keys=KEY) as (client, _):
        assert (await client.post("/console/sign-in", data={"key": KEY})).status_code == 401


async def test_an_admin_key_in_a_header_is_accepted(open_console: Open) -> None:
    async with open_console(REMOTE, admin_api_keys=ADMIN) as (client, _):
        headers = {"authorization": f"Bearer {ADMIN}"}
        assert (await client.get("/console/cache", headers=headers)).status_code == 200


async def test_signing_out_ends_the_session(open_console: Open) -> None:
    async with open_console(REMOTE, admin_api_keys=ADMIN) as (client, _):
        signed_in = await client.post("/console/sign-in", data={"key": ADMIN})
        cookie = signed_in.headers["set-cookie"].partition(";")[0]
        assert "/console/sign-out" in (await client.get("/console")).text
        await client.post("/console/sign-out")
        assert (await client.get("/console", headers={"cookie": cookie})).status_code == 303


async def test_a_made_up_cookie_is_worthless(open_console: Open) -> None:
    async with open_console(REMOTE, admin_api_keys=ADMIN) as (client, _):
        for value in ("", "x", "x" * 43, "\xff", '"', "a=b=c"):
            headers = [(b"cookie", f"emb_provider_console_9000={value}".encode("latin-1"))]
            assert (await client.get("/console", headers=headers)).status_code == 303


async def test_without_admin_keys_a_remote_browser_needs_the_link(open_console: Open) -> None:
    """The link works once; after it, the token is no longer in the URL."""
    async with open_console(REMOTE, host="emb.example:9000", allowed_hosts="*") as (client, app):
        assert "docker logs" in (await client.get("/console/sign-in")).text
        token = app.state.console.sessions.create_link()
        assert (await client.get("/console/sign-in", params={"token": f"{token}x"})).status_code == 401
        response = await client.get("/console/sign-in", params={"token": token})
        assert (response.status_code, response.headers["location"]) == (303, "/console")
        assert (await client.get("/console")).status_code == 200
        assert (await client.get("/console/sign-in", params={"token": token})).status_code == 401


async def test_a_preview_of_the_link_does_not_use_it(open_console: Open) -> None:
    async with open_console(REMOTE, allowed_hosts="*") as (client, app):
        token = app.state.console.sessions.create_link()
        await client.head("/console/sign-in", params={"token": token})
        assert (await client.get("/console/sign-in", params={"token": token})).status_code == 303


async def test_assets_and_the_form_are_public(open_console: Open) -> None:
    async with open_console(REMOTE, api_keys=KEY, admin_api_keys=ADMIN) as (client, _):
        for path in ("/console/sign-in", "/console/static/console.css"):
            assert (await client.get(path)).status_code == 200
        assert (await client.get("/console/static/../page.py")).status_code in (303, 404)
        assert (await client.get("/console/static/%2e%2e%2fpage.py")).status_code == 404


async def test_origins_for_the_api_do_not_open_the_console(open_console: Open) -> None:
    async with open_console(cors_origins="https://app.example") as (client, _):
        response = await client.get("/console", headers={"origin": "https://app.example"})
        assert "access-control-allow-origin" not in response.headers
        assert response.status_code == 303


async def test_another_host_name_is_refused(open_console: Open) -> None:
    """A page cannot reach the console under its own name (DNS rebinding)."""
    async with open_console(host="evil.example:9000") as (client, _):
        assert (await client.get("/console")).status_code == 400


async def test_the_console_can_be_turned_off(open_console: Open) -> None:
    async with open_console(console=False) as (client, _):
        for path in [*PAGES, "/console/sign-in", "/console/static/console.css"]:
            assert (await client.get(path)).status_code == 404, path
        assert (await client.get("/")).json()["console"] is None
    async with open_console() as (client, _):
        assert (await client.get("/")).json()["console"] == "/console"


# --- sessions -----------------------------------------------------------------------------------------


def test_an_idle_session_ends() -> None:
    now = 0.0
    sessions = Sessions(clock=lambda: now)
    token = sessions.open()
    for _ in range(3):
        now += IDLE_S
        assert sessions.is_open(token)
    now += IDLE_S + 1
    assert not sessions.is_open(token)
    assert not sessions.is_open(token)


def test_the_number_of_sessions_is_limited() -> None:
    """The session that was not used for the longest time ends."""
    sessions = Sessions()
    first, second = sessions.open(), sessions.open()
    assert sessions.is_open(first)
    for _ in range(999):
        sessions.open()
    assert not sessions.is_open(second)
    assert sessions.is_open(first)


def test_a_new_link_replaces_the_earlier_one() -> None:
    sessions = Sessions()
    first, second = sessions.create_link(), sessions.create_link()
    assert not sessions.redeem(first)
    assert sessions.redeem(second)
    assert not sessions.redeem(second)


@pytest.mark.slow
def test_the_start_prints_the_link(tmp_path: Path) -> None:
    """Only a service that other machines can reach, and that has no admin keys, prints one."""
    with Service(tmp_path, HOST="0.0.0.0", PRELOAD_MODELS="none", LOG_FORMAT="text") as service:
        link = re.search(r"/console/sign-in\?token=[\w-]{43}", service.wait().log_text())
        assert link is not None
        headers = {"x-forwarded-for": "192.0.2.7"}
        assert service.http.get("/console", headers=headers).headers["location"] == "/console/sign-in"
        assert service.http.get(link[0], headers=headers).headers["location"] == "/console"
        assert service.http.get("/console", headers=headers).status_code == 200
        token = link[0].partition("=")[2]
        assert service.log_text().count(token) == 1


def test_a_local_service_prints_no_link(service: Service) -> None:
    assert f"console: {service.url}/console" in service.log_text()
    assert "token=" not in service.log_text()
