"""Decompresses request bodies, a piece at a time, so that a small body cannot become a large one unnoticed."""

from __future__ import annotations

import asyncio
import zlib
from typing import TYPE_CHECKING

from emb_model_provider.errors import CompressedBodyError, RequestError

if TYPE_CHECKING:
    from starlette.types import Message, Receive

_PIECE_BYTES = 256 * 1024
"""Decompressing this much takes less than a millisecond, after which the event loop can answer other requests."""
_GZIP_BITS, _ZLIB_BITS, _RAW_BITS = 31, 15, -15


def decompressed(encoding: str, receive: Receive) -> Receive:
    """Return a `receive` that yields the decompressed body of a request.

    Args:
        encoding: The value of the header Content-Encoding.
        receive: Yields the body as it was sent.

    Raises:
        CompressedBodyError: The encoding is not supported.
    """
    match encoding.strip().lower():
        case "identity" | "":
            return receive
        case "gzip" | "x-gzip":
            return _Decompressor(_GZIP_BITS, receive)
        case "deflate":
            return _Decompressor(_ZLIB_BITS, receive)
    raise CompressedBodyError(
        f"The request body is compressed in an unsupported way (Content-Encoding: {encoding[:50]}). Send it as plain JSON, "
        "or compress it with gzip or deflate."
    )


class _Decompressor:
    """Receives a compressed body, and returns it in pieces of limited size."""

    def __init__(self, bits: int, receive: Receive) -> None:
        self._receive = receive
        self._stream = zlib.decompressobj(bits)
        self._may_be_raw = bits == _ZLIB_BITS
        self._compressed = b""
        self._is_complete = False
        """Whether the whole compressed body was received."""

    async def __call__(self) -> Message:
        if self._is_complete and self._is_finished:
            return await self._receive()
        if self._compressed:
            await asyncio.sleep(0)
        elif not self._is_complete:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._compressed = message.get("body", b"")
            self._is_complete = not message.get("more_body", False)
        piece = self._decompress()
        return {"type": "http.request", "body": piece, "more_body": not (self._is_complete and self._is_finished)}

    @property
    def _is_finished(self) -> bool:
        return self._stream.eof and not self._compressed

    def _decompress(self) -> bytes:
        try:
            piece = self._stream.decompress(self._compressed, _PIECE_BYTES)
        except zlib.error as error:
            if not self._may_be_raw:
                raise _invalid() from error
            # Some clients send deflate without the header that the standard requires.
            self._may_be_raw, self._stream = False, zlib.decompressobj(_RAW_BITS)
            return self._decompress()
        self._may_be_raw = self._may_be_raw and not self._compressed
        self._compressed = self._stream.unconsumed_tail
        if self._stream.unused_data or (
            self._is_complete and not self._compressed and not piece and not self._stream.eof
        ):
            raise _invalid()
        return piece


def _invalid() -> RequestError:
    return RequestError("We could not decompress the body of your request.", code="invalid_json")
