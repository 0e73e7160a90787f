"""The ASGI application without a server and without models."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import httpx
import pytest

from emb_model_provider.api.app import Application, create_app
from emb_model_provider.errors import ModelInUseError
from emb_model_provider.settings import Settings
from tests.service import assert_error

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


@pytest.fixture
def app() -> Application:
    return create_app(Settings.from_values(), on_nothing_to_serve=lambda: None)


def test_the_database_of_batches_is_imported_when_it_is_used() -> None:
    """An idle service does not pay for it."""
    program = (
        "import sys\n"
        "from emb_model_provider.api.app import create_app\n"
        "from emb_model_provider.settings import Settings\n"
        "create_app(Settings.from_values(), on_nothing_to_serve=lambda: None)\n"
        "print({'alembic', 'psycopg', 'sqlalchemy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def client(app: Application) -> httpx.AsyncClient:
    """Return a client that raises the exceptions that the application does not handle."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


async def test_error_of_a_route_is_answered(app: Application) -> None:
    """An unexpected error becomes a 500 with the request id, an error of this package gets its own status."""

    @app.get("/defect")
    async def defect() -> None:
        raise ValueError("a defect")

    @app.get("/in-use")
    async def in_use() -> None:
        raise ModelInUseError("The model is in use.")

    async with client(app) as http:
        response = await http.get("/defect")
        assert_error(response, 500, "internal_error", type="server_error", phrase=response.headers["x-request-id"])
        assert "a defect" not in response.text
        assert_error(await http.get("/in-use"), 409, "model_in_use", phrase="The model is in use.")


async def test_requests_for_embeddings_do_not_pass_through_fastapi(app: Application) -> None:
    """FastAPI's layers would take longer than everything else that is done for a short text."""
    paths = []

    class Recorder:
        def __init__(self, app: ASGIApp) -> None:
            self._app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            paths.append(scope["path"])
            await self._app(scope, receive, send)

    app.add_middleware(Recorder)
    async with client(app) as http:
        assert_error(await http.post("/v1/embeddings", json={}), 400, "missing_required_parameter", param="input")
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/v1/embeddings")).status_code == 405
    assert paths == ["/health", "/v1/embeddings"]
