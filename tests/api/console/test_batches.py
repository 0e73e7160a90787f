"""The page of batches: those of all keys, their progress and errors, and what can be done with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.api.console.conftest import REMOTE, Open

if TYPE_CHECKING:
    import httpx

KEYS = {"api_keys": "first,second", "api_key_names": ("search", "indexing"), "admin_api_keys": "admin"}
HTMX = {"hx-request": "true"}
ADMIN = {"authorization": "Bearer admin"}


async def upload(client: httpx.AsyncClient, key: str, content: bytes = b"hello\n") -> str:
    headers = {"authorization": f"Bearer {key}"}
    response = await client.post("/v1/files", files={"file": content}, data={"purpose": "batch"}, headers=headers)
    identifier: str = response.json()["id"]
    return identifier


async def create(client: httpx.AsyncClient, key: str) -> str:
    fields = {"input_file_id": await upload(client, key), "endpoint": "/v1/embeddings", "completion_window": "24h"}
    response = await client.post("/v1/batches", json=fields, headers={"authorization": f"Bearer {key}"})
    identifier: str = response.json()["id"]
    return identifier


async def test_batches_of_all_keys_are_shown_and_cancelled(open_console: Open) -> None:
    """As long as one of them is not over, the list updates itself. Without JavaScript, forms lead back to the page."""
    async with open_console(**KEYS) as (client, app):
        await app.state.services.batches.open()
        await app.state.services.batches.stop()  # so that nothing changes meanwhile
        batches = {name: await create(client, key) for name, key in (("search", "first"), ("indexing", "second"))}
        text = (await client.get("/console/batches", headers=ADMIN)).text
        for name, batch in batches.items():
            assert batch in text
            assert f"key {name}" in text
        assert text.count("Checking the file") == 2
        assert 'hx-trigger="every 2s"' in text
        cancelled = await client.post(
            "/console/batches/cancel", data={"batch": batches["search"]}, headers=ADMIN | HTMX
        )
        assert cancelled.text.startswith("<section")
        assert cancelled.text.count("Cancelling") == 1
        assert cancelled.text.count('name="batch"') == 1
        again = await client.post("/console/batches/cancel", data={"batch": batches["indexing"]}, headers=ADMIN)
        assert (again.status_code, again.headers["location"]) == (303, "/console/batches")
        chinese = (await client.get("/console/batches?lang=zh", headers=ADMIN)).text
        assert chinese.count("正在取消") == 2


async def test_files_can_be_downloaded(open_console: Open) -> None:
    """Those of all keys, by someone who is signed in."""
    async with open_console(**KEYS, address=REMOTE) as (client, _):
        file_id = await upload(client, "first")
        path = f"/console/batches/files/{file_id}"
        assert (await client.get(path)).status_code == 303
        response = await client.get(path, headers=ADMIN)
        assert (response.content, response.headers["x-content-type-options"]) == (b"hello\n", "nosniff")
        assert response.headers["content-disposition"].startswith("attachment")
        assert (await client.get("/console/batches/files/file-x", headers=ADMIN)).status_code == 404


async def test_without_batches_there_is_no_page(open_console: Open) -> None:
    async with open_console(batches=False) as (client, _):
        assert (await client.get("/console/batches")).status_code == 404
        assert "/console/batches" not in (await client.get("/console")).text
