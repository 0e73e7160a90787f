"""`/v1/files` without a server: uploads, lists, keys and limits. Uploads to the real service are in `test_uploads.py`."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from emb_model_provider.api.app import create_app
from emb_model_provider.settings import Settings
from tests.service import assert_error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

KEY, OTHER_KEY = "key-of-search", "key-of-indexing"
LINES = b'{"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": {"input": "hello"}}\n'
MAX_BYTES = 100_000
BOUNDARY = "limit"
HEAD = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
PURPOSE = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
END = f"--{BOUNDARY}--\r\n"


@pytest.fixture
async def http(tmp_path: Path, batch_database: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client with a key of a service that accepts small bodies and files."""
    settings = Settings.from_values(
        cache_dir=tmp_path,
        batch_dir=batch_database,
        max_body_mb=0.01,
        max_file_bytes=MAX_BYTES,
        api_keys=f"{KEY},{OTHER_KEY}",
    )
    app = create_app(settings, on_nothing_to_serve=lambda: None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        client.headers["authorization"] = f"Bearer {KEY}"
        yield client
    await app.state.services.batches.stop()


async def upload(http: httpx.AsyncClient, content: bytes = LINES, name: str = "a.jsonl", **fields: str) -> Any:
    response = await http.post("/v1/files", files={"file": (name, content)}, data={"purpose": "batch", **fields})
    assert response.status_code == 200, response.text
    return response.json()


def form(body: str | bytes, content_type: str = f"multipart/form-data; boundary={BOUNDARY}") -> dict[str, Any]:
    return {"content": body, "headers": {"content-type": content_type}}


async def test_an_upload_is_described_listed_downloaded_and_deleted(http: httpx.AsyncClient) -> None:
    file = await upload(http, name="requests.jsonl")
    assert file == {
        "id": file["id"],
        "object": "file",
        "bytes": len(LINES),
        "created_at": file["created_at"],
        "expires_at": file["created_at"] + 30 * 24 * 3600,
        "filename": "requests.jsonl",
        "purpose": "batch",
        "status": "processed",
        "status_details": None,
    }
    assert file["id"].startswith("file-")
    assert (await http.get(f"/v1/files/{file['id']}")).json() == file
    listed = (await http.get("/v1/files")).json()
    assert listed == {
        "object": "list",
        "data": [file],
        "first_id": file["id"],
        "last_id": file["id"],
        "has_more": False,
    }
    content = await http.get(f"/v1/files/{file['id']}/content")
    assert (content.content, content.headers["content-type"]) == (LINES, "application/octet-stream")
    assert (await http.get(f"/v1/files/{file['id']}/content", headers={"range": "bytes=2-4"})).content == LINES[2:5]
    deleted = await http.delete(f"/v1/files/{file['id']}")
    assert deleted.json() == {"id": file["id"], "object": "file", "deleted": True}
    assert_error(await http.get(f"/v1/files/{file['id']}"), 404, "file_not_found", param="id", phrase=file["id"])


@pytest.mark.parametrize("size", [0, 1, 70_000, MAX_BYTES], ids=str)
async def test_every_byte_arrives(http: httpx.AsyncClient, size: int) -> None:
    """Also bytes that resemble the boundary, and files larger than a body of other routes may be."""
    content = (b"\r\n--limit\r\n-" * (size // 12 + 1))[:size]
    file = await upload(http, content)
    assert file["bytes"] == size
    assert (await http.get(f"/v1/files/{file['id']}/content")).content == content


async def test_fields_may_follow_the_file(http: httpx.AsyncClient) -> None:
    """As OpenAI's SDK for JavaScript sends them. The body may be compressed."""
    expiry = "".join(
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="expires_after[{name}]"\r\n\r\n{value}\r\n'
        for name, value in (("anchor", "created_at"), ("seconds", "3600"))
    )
    body = (HEAD + "x\r\n" + PURPOSE + expiry + END).encode()
    for content, encoding in ((body, "identity"), (gzip.compress(body), "gzip")):
        sent = form(content)
        sent["headers"]["content-encoding"] = encoding
        file = (await http.post("/v1/files", **sent)).json()
        assert (file["bytes"], file["expires_at"] - file["created_at"]) == (1, 3600)


@pytest.mark.parametrize(
    ("name", "stored"),
    [("../../etc/passwd", "passwd"), ("C:\\data\\a.jsonl", "a.jsonl"), ("文件.jsonl", "文件.jsonl"), ("a\u202e.jsonl", "a?.jsonl")],
    ids=["directories", "windows", "chinese", "unprintable"],
)  # fmt: skip
async def test_names_of_files(http: httpx.AsyncClient, name: str, stored: str) -> None:
    file = await upload(http, name=name)
    assert file["filename"] == stored
    assert (await http.get(f"/v1/files/{file['id']}/content")).content == LINES


INVALID: dict[str, tuple[dict[str, Any], int, str, str | None, str]] = {
    "json": ({"json": {"purpose": "batch"}}, 400, "invalid_content_type", "file", "multipart/form-data"),
    "no boundary": (form(HEAD, "multipart/form-data"), 400, "invalid_content_type", "file", "curl -F"),
    "long boundary": (form(HEAD, f"multipart/form-data; boundary={'x' * 300}"), 400, "invalid_form", None, "Boundary"),
    "no file": (form(PURPOSE + END), 400, "missing_required_parameter", "file", "Send the file"),
    "no purpose": (form(HEAD + "x\r\n" + END), 400, "missing_required_parameter", "purpose", "purpose=batch"),
    "two files": (form(PURPOSE + (HEAD + "x\r\n") * 2 + END), 400, "invalid_form", "file", "twice"),
    "no end": (form(PURPOSE + HEAD + "x"), 400, "invalid_form", "file", "Send it again"),
    "not a form": (form("hello"), 400, "invalid_form", None, "not valid multipart/form-data"),
    "long field": (form(PURPOSE.replace("batch", "x" * 70_000) + END), 400, "invalid_value", "purpose", "too long"),
    "many fields": (form(PURPOSE.replace("purpose", "{}") * 40), 400, "invalid_form", None, "more than 32 fields"),
    "purpose": (form(PURPOSE.replace("batch", "vision") + HEAD + "x\r\n" + END), 400, "invalid_value", "purpose", "'batch'"),
    "too large": (form(PURPOSE + HEAD + "x" * (MAX_BYTES + 1)), 413, "file_too_large", "file", "several files"),
}  # fmt: skip
INVALID["many fields"][0]["content"] = "".join(PURPOSE.replace("purpose", f"field-{n}") for n in range(40)) + END


@pytest.mark.parametrize("case", INVALID)
async def test_invalid_uploads(http: httpx.AsyncClient, batch_database: Path, case: str) -> None:
    """The message says what to do, and nothing stays on the disk."""
    request, status, code, param, phrase = INVALID[case]
    assert_error(await http.post("/v1/files", **request), status, code, param=param, phrase=phrase)
    assert list((batch_database / "files").iterdir()) == []
    assert (await http.get("/v1/files")).json()["data"] == []


@pytest.mark.parametrize(
    ("anchor", "seconds"), [("created_at", "3599"), ("created_at", "2592001"), ("created_at", "soon"), ("now", "3600")]
)
async def test_invalid_expiry(http: httpx.AsyncClient, anchor: str, seconds: str) -> None:
    fields = {"purpose": "batch", "expires_after[anchor]": anchor, "expires_after[seconds]": seconds}
    response = await http.post("/v1/files", files={"file": LINES}, data=fields)
    wrong = "anchor" if anchor == "now" else "seconds"
    assert_error(response, 400, "invalid_value", param=f"expires_after[{wrong}]", phrase="Supported values")


async def test_an_announced_size_is_refused_at_once(http: httpx.AsyncClient) -> None:
    """Nothing of the body is read."""

    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body is read")
        yield b""

    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}", "content-length": "300000000"}
    response = await http.post("/v1/files", content=body(), headers=headers)
    assert_error(response, 413, "request_too_large", phrase="EMB_PROVIDER_MAX_FILE_BYTES")


async def test_a_form_around_a_small_file_is_limited(http: httpx.AsyncClient) -> None:
    """What follows the form, too, and what a compressed body contains."""
    body = gzip.compress((PURPOSE + HEAD + "x\r\n" + END + "x" * 2_000_000).encode())
    sent = form(body)
    sent["headers"]["content-encoding"] = "gzip"
    assert_error(await http.post("/v1/files", **sent), 413, "request_too_large")


async def test_lists_have_pages(http: httpx.AsyncClient) -> None:
    ids = [(await upload(http, name=f"{number}.jsonl"))["id"] for number in range(5)]

    async def page(**query: str | int) -> tuple[list[str], bool]:
        body = (await http.get("/v1/files", params=query)).json()
        found = [file["id"] for file in body["data"]]
        assert (body["first_id"], body["last_id"]) == ((found[0], found[-1]) if found else (None, None))
        return found, body["has_more"]

    assert await page(limit=2) == ([ids[4], ids[3]], True)
    assert await page(limit=2, after=ids[3]) == ([ids[2], ids[1]], True)
    assert await page(limit=2, after=ids[1]) == ([ids[0]], False)
    assert await page(order="asc", after=ids[2]) == ([ids[3], ids[4]], False)
    assert await page(purpose="batch_output") == ([], False)
    assert await page(purpose="batch", limit=5) == (ids[::-1], False)


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [({"limit": "0"}, 400, "limit"), ({"limit": "10001"}, 400, "limit"), ({"limit": "x"}, 400, "limit"), ({"order": "up"}, 400, "order"), ({"after": "file-x"}, 404, "after")],
    ids=["zero", "many", "text", "order", "after"],
)  # fmt: skip
async def test_invalid_lists(http: httpx.AsyncClient, query: dict[str, str], status: int, param: str) -> None:
    response = await http.get("/v1/files", params=query)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


async def test_a_key_sees_its_own_files_only(http: httpx.AsyncClient) -> None:
    """For others they do not exist."""
    file = await upload(http)
    http.headers["authorization"] = f"Bearer {OTHER_KEY}"
    assert (await http.get("/v1/files")).json()["data"] == []
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        response = await http.request(method, f"/v1/files/{file['id']}{path}")
        assert_error(response, 404, "file_not_found", param="id")
    assert_error(await http.get("/v1/files", params={"after": file["id"]}), 404, "file_not_found", param="after")
    http.headers["authorization"] = "Bearer wrong"
    assert_error(await http.get("/v1/files"), 401, "invalid_api_key")
    http.headers["authorization"] = f"Bearer {KEY}"
    assert (await http.get(f"/v1/files/{file['id']}/content")).content == LINES


async def test_a_missing_content_is_explained(http: httpx.AsyncClient, batch_database: Path) -> None:
    """As in a replica with another directory."""
    file = await upload(http)
    (batch_database / "files" / file["id"]).unlink()
    response = await http.get(f"/v1/files/{file['id']}/content")
    assert_error(response, 500, "content_missing", type="server_error", phrase="EMB_PROVIDER_BATCH_DIR")


@pytest.mark.parametrize("path", ["/files", "/v1/v1/files/", "/openai/v1/files"])
async def test_base_urls(http: httpx.AsyncClient, path: str) -> None:
    """The limits of uploads apply under every spelling of the path."""
    content = b"x" * 50_000
    response = await http.post(path, files={"file": content}, data={"purpose": "batch"})
    assert response.json()["bytes"] == len(content), response.text


async def test_routes_can_be_turned_off(tmp_path: Path) -> None:
    settings = Settings.from_values(cache_dir=tmp_path, batches=False)
    app = create_app(settings, on_nothing_to_serve=lambda: None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        assert_error(await client.get("/v1/files"), 404, "unknown_url")
        assert_error(await client.get("/v1/batches"), 404, "unknown_url")
    assert "/v1/files" not in app.openapi()["paths"]
