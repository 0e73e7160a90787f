"""The load generator counts every response, and its latencies include waiting."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import ROOT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

GENERATOR = ROOT / "benchmarks" / "generator.py"


async def test_closed_loop_counts_every_response_once(tmp_path: Path) -> None:
    """The responses of the requests that are in progress at the end are counted too."""
    answered = 0

    async def respond(_: bytes) -> bytes:
        nonlocal answered
        await asyncio.sleep(0.02)
        answered += 1
        # As large as vectors, so that it arrives in several pieces.
        return _response("200 OK", b"x" * 300_000)

    async with _server(respond) as port:
        result = await _generate(port, tmp_path, bodies=5)
    assert result["ok"] == answered > 0
    assert result["errors"] == {}
    assert result["repeated"] == max(0, answered - 5)
    assert result["latency_ms"]["p50"] >= 20


async def test_errors_are_counted_by_status_or_reason(tmp_path: Path) -> None:
    """Errors are other statuses than 200, and connections that end without a response."""
    number = 0

    async def respond(_: bytes) -> bytes | None:
        nonlocal number
        number += 1
        await asyncio.sleep(0.005)
        return {0: _response("200 OK"), 1: _response("429 Too Many Requests"), 2: None}[number % 3]

    async with _server(respond) as port:
        result = await _generate(port, tmp_path)
    assert set(result["errors"]) == {"429", "broken"}
    assert result["ok"] + sum(result["errors"].values()) == number


async def test_requests_without_a_response_are_timeouts(tmp_path: Path) -> None:
    """The run ends after its timeout."""

    async def respond(_: bytes) -> bytes:
        await asyncio.sleep(60)
        raise AssertionError

    async with _server(respond) as port:
        result = await _generate(port, tmp_path, timeout_s=0.3)
    assert (result["ok"], result["errors"]) == (0, {"timeout": 4})


@pytest.mark.parametrize("connections", [1, 64])
async def test_open_loop_measures_from_the_time_a_request_was_due(tmp_path: Path, connections: int) -> None:
    """Requests arrive faster than the server responds, so latencies grow, with any number of connections."""
    lock = asyncio.Lock()

    async def respond(_: bytes) -> bytes:
        async with lock:
            await asyncio.sleep(0.02)
        return _response("200 OK")

    async with _server(respond) as port:
        result = await _generate(port, tmp_path, mode="open", rate=100.0, seed=3, seconds=0.5, connections=connections)
    assert result["errors"] == {}
    assert result["latency_ms"]["max"] > 10 * 20


@asynccontextmanager
async def _server(respond: Callable[[bytes], Awaitable[bytes | None]]) -> AsyncIterator[int]:
    """Run a server that sends `respond(body)` to each request, or closes the connection for None."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (response := await respond(await _read_body(reader))) is not None:
                writer.write(response)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def _read_body(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
    return await reader.readexactly(length)


def _response(status: str, body: bytes = b"{}") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


async def _generate(port: int, directory: Path, bodies: int = 100, **fields: Any) -> dict[str, Any]:
    """Run the generator, with a closed loop of 4 connections unless `fields` of the job differ."""
    path = directory / "bodies"
    path.write_text("".join(f'{{"input": "{number}"}}\n' for number in range(bodies)))
    job = {
        "host": "127.0.0.1", "port": port, "bodies": str(path), "mode": "closed", "connections": 4,
        "seconds": 0.3, "timeout_s": 2.0, **fields,
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", str(GENERATOR),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, _ = await process.communicate(json.dumps(job).encode())
    assert process.returncode == 0
    result: dict[str, Any] = json.loads(output)
    return result
