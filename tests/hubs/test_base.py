"""Checks of the connection to a hub."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.hubs.base import check_hub
from tests.hubs.conftest import HF_REPO, MS_REPO
from tests.hubs.helpers import server_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.hubs.base import HubStatus
    from emb_model_provider.settings import HubSettings
    from tests.hubs.servers import HubServer, HuggingFaceServer, ModelScopeServer

HUBS = {"huggingface": HF_REPO, "modelscope": MS_REPO}

pytestmark = pytest.mark.parametrize("hub", list(HUBS))


@pytest.fixture
def server(hub: str, huggingface: HuggingFaceServer, modelscope: ModelScopeServer) -> HubServer:
    return server_of(HUBS[hub], huggingface, modelscope)[0]


@pytest.fixture
def check(hub: str, settings: Callable[..., HubSettings]) -> Callable[..., HubStatus]:
    """Return a function that checks the hub; keyword arguments are settings."""

    def check(repository: str = HUBS[hub], *, token: str | None = None, **changes: object) -> HubStatus:
        config = settings(hf_token=token, modelscope_token=token, **changes)
        return check_hub(hub, config, repository=repository)

    return check


def test_reachable_hub(hub: str, server: HubServer, check: Callable[..., HubStatus]) -> None:
    status = check()
    assert (status.hub, status.endpoint, status.repository) == (hub, server.url, HUBS[hub])
    assert (status.state, status.token, status.reason) == ("answers", False, "")
    assert not server.bodies()


def test_missing_repository(check: Callable[..., HubStatus]) -> None:
    assert check("iic/nothing").state == "lacks"


def test_rejected_token(server: HubServer, check: Callable[..., HubStatus]) -> None:
    server.faults.status = 403
    status = check(token="hub_secret")
    assert (status.state, status.token, status.reason) == ("refuses", True, "the token is not valid")


def test_required_token(server: HubServer, check: Callable[..., HubStatus]) -> None:
    server.token = "hub_right"
    status = check()
    assert (status.state, status.token) == ("refuses", False)


def test_owner_of_the_token_can_be_unknown(server: HubServer, check: Callable[..., HubStatus]) -> None:
    """A mirror need not know it, and the servers here do not."""
    server.token = "hub_right"
    status = check(token="hub_right")
    assert (status.state, status.token) == ("answers", True)


def test_error_of_the_hub(server: HubServer, check: Callable[..., HubStatus]) -> None:
    server.faults.status = 503
    status = check()
    assert status.state == "fails"
    assert status.reason


def test_refused_connection(check: Callable[..., HubStatus]) -> None:
    """The reason is one line without the token."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    status = check(token="hub_secret", hf_endpoint=url, modelscope_endpoint=url)
    assert status.state == "silent"
    assert status.reason
    assert "hub_secret" not in status.reason
    assert "\n" not in status.reason


def test_hub_that_does_not_respond(hub: str, settings: Callable[..., HubSettings]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        status = check_hub(hub, settings(hf_endpoint=url, modelscope_endpoint=url), timeout_s=0.2)
    assert (status.state, status.token) == ("silent", False)
    assert "0.2 s" in status.reason
