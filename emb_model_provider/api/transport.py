"""How a connection's bytes come and go: when to read on, and what is written at once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from uvicorn.protocols.http.flow_control import FlowControl

if TYPE_CHECKING:
    from collections.abc import Sized


class Flow(FlowControl):
    """Reads no more while requests wait in the connection, or answers for the client."""

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if self.read_paused and not self.write_paused and not self._waiting:
            super().resume_reading()


class JoinedWrites(asyncio.Transport):
    """Holds a write back until the next one, or until the event loop's next turn, and writes both at once."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._held = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._held:
            self._transport.write(self._held + data)
            self._held = b""
        elif data:
            self._held = bytes(data)
            self._loop.call_soon(self.flush)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def flush(self) -> None:
        """Write what is held back."""
        if self._held:
            self._transport.write(self._held)
            self._held = b""
