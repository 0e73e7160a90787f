"""The load generator counts what happened, and hides no wait."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

GENERATOR = Path(__file__).parents[2] / "benchmarks" / "generator.py"


async def _head(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
    return await reader.readexactly(length)


@asynccontextmanager
async def _server(answer: Callable[[bytes], Awaitable[bytes | None]]) -> AsyncIterator[int]:
    """Serve `answer`'s response to each body; None closes the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (response := await answer(await _head(reader))) is not None:
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


def _response(status: str, body: bytes = b"{}") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


async def _generate(port: int, directory: Path, bodies: int = 100, **job: Any) -> dict[str, Any]:
    path = directory / "bodies"
    path.write_text("".join(f'{{"input": "{number}"}}\n' for number in range(bodies)))
    given = {
        "host": "127.0.0.1", "port": port, "bodies": str(path), "mode": "closed", "connections": 4,
        "seconds": 0.3, "timeout_s": 2.0, **job,
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", str(GENERATOR),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, _ = await process.communicate(json.dumps(given).encode())
    assert process.returncode == 0
    seen: dict[str, Any] = json.loads(output)
    return seen


async def test_closed_loop_counts_every_answer_once(tmp_path: Path) -> None:
    """What the server answered is what is reported, those under way at the end included."""
    answered = 0

    async def answer(_: bytes) -> bytes:
        nonlocal answered
        await asyncio.sleep(0.02)
        answered += 1
        # An answer in two pieces and of some size, as vectors are.
        return _response("200 OK", b"x" * 300_000)

    async with _server(answer) as port:
        seen = await _generate(port, tmp_path, bodies=5)
    assert seen["ok"] == answered > 0
    assert seen["errors"] == {}
    assert seen["repeated"] == max(0, answered - 5)
    assert seen["latency_ms"]["p50"] >= 20


async def test_errors_are_counted_and_not_as_answers(tmp_path: Path) -> None:
    """A status other than 200 and a connection that ends are errors with a name."""
    number = 0

    async def answer(_: bytes) -> bytes | None:
        nonlocal number
        number += 1
        await asyncio.sleep(0.005)
        return {0: _response("200 OK"), 1: _response("429 Too Many Requests"), 2: None}[number % 3]

    async with _server(answer) as port:
        seen = await _generate(port, tmp_path)
    assert set(seen["errors"]) == {"429", "broken"}
    assert seen["ok"] + sum(seen["errors"].values()) == number


async def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    """The run ends after its timeout, and what was waiting counts as errors."""

    async def answer(_: bytes) -> bytes:
        await asyncio.sleep(60)
        raise AssertionError

    async with _server(answer) as port:
        seen = await _generate(port, tmp_path, timeout_s=0.3)
    assert (seen["ok"], seen["errors"]) == (0, {"timeout": 4})


@pytest.mark.parametrize("connections", [1, 64])
async def test_open_loop_counts_from_when_a_request_was_due(tmp_path: Path, connections: int) -> None:
    """One answer at a time, each slower than requests come: waiting shows, however few connections there are."""
    lock = asyncio.Lock()

    async def answer(_: bytes) -> bytes:
        async with lock:
            await asyncio.sleep(0.02)
        return _response("200 OK")

    async with _server(answer) as port:
        seen = await _generate(
            port, tmp_path, mode="open", rate=100.0, seed=3, seconds=0.5, connections=connections
        )
    assert seen["errors"] == {}
    assert seen["latency_ms"]["max"] > 10 * 20
