"""Bounds on what a hub may answer to a listing: the bytes and the number of its answers, and the number of files.

The clients of the hubs read whole answers into memory, and follow as many pages as the hub names.
"""

from __future__ import annotations

import importlib
import math
import threading
import unicodedata
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from emb_model_provider.errors import CorruptSnapshotError, HubError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")

MAX_LISTING_BYTES = 32 * 1024**2
"""Largest size of all answers of a listing together."""
MAX_ANSWERS = 1_000
MAX_FILES = 100_000
MAX_NAME_BYTES = 255
"""Longest part of a path that common file systems accept."""

_COMPRESSION = 64
"""How much smaller the answers must be if the hub compresses them unasked."""


class _Budget(threading.local):
    """What a hub may still answer to the listing that this thread waits for."""

    bytes_left: float = math.inf
    answers_left: float = math.inf


_budget = _Budget()


@contextmanager
def bounded_listing() -> Iterator[None]:
    """Bound the answers of the hub that this thread receives through a session of `bind_session`.

    Raises:
        HubError: The answers are too large, or too many.
    """
    _budget.bytes_left, _budget.answers_left = MAX_LISTING_BYTES, MAX_ANSWERS
    try:
        yield
    finally:
        _budget.bytes_left = _budget.answers_left = math.inf


def bounded_files(files: Iterable[T]) -> Iterator[T]:
    """Yield the entries of a listing; HubError if there are too many."""
    for number, file in enumerate(files):
        if number >= MAX_FILES:
            raise _too_large(f"{MAX_FILES} files")
        yield file


def is_plain_path(path: str) -> bool:
    """Return whether all parts of a path can be names of files, without control and other invisible characters."""
    return not any(unicodedata.category(character)[0] == "C" for character in path) and all(
        len(part.encode(errors="surrogatepass")) <= MAX_NAME_BYTES and part == part.strip() for part in path.split("/")
    )


def require_size(path: str, size: object) -> int:
    """Return the listed size of a file; CorruptSnapshotError if it is none."""
    if type(size) is not int or size < 0:
        raise CorruptSnapshotError(f"The hub lists the size {size!r} for the file {path[:200]!r}. Try another mirror.")
    return size


def bind_session(session: Any) -> None:
    """Let the answers that a session of httpx or requests receives count for `bounded_listing`."""
    hooks = getattr(session, "event_hooks", None)
    if hooks is not None:
        if _on_httpx_answer not in hooks["response"]:
            hooks["request"].append(_on_httpx_request)
            hooks["response"].append(_on_httpx_answer)
            session.event_hooks = hooks
    elif _on_requests_answer not in session.hooks["response"]:
        session.hooks["response"].append(_on_requests_answer)


def _on_httpx_request(request: Any) -> None:
    if _budget.bytes_left < math.inf:
        request.headers["accept-encoding"] = "identity"


def _on_httpx_answer(response: Any) -> None:
    _count_answer()
    # The client has its own copy of httpx, whose name depends on its version.
    base: Any = importlib.import_module(type(response).__module__.partition(".")[0]).SyncByteStream
    stream, weight = response.stream, _COMPRESSION if "content-encoding" in response.headers else 1

    class Bounded(base):  # type: ignore[misc]  # its base is not known before
        def __iter__(self) -> Iterator[bytes]:
            yield from _counted(stream, weight)

        def close(self) -> None:
            stream.close()

    if _budget.bytes_left < math.inf:
        response.stream = Bounded()


def _on_requests_answer(response: Any, *_: object, **__: object) -> None:
    _count_answer()
    if _budget.bytes_left == math.inf:
        return
    raw = response.raw
    # `stream` can call `read`, so that its bytes count twice.
    for name in ("read", "read1"):
        if (read := getattr(raw, name, None)) is not None:
            setattr(raw, name, partial(_read_and_count, read))
    stream = raw.stream
    raw.stream = lambda *args, **options: _counted(stream(*args, **options), 1)


def _read_and_count(read: Callable[..., bytes], *args: Any, **options: Any) -> bytes:
    data = read(*args, **options)
    _count_bytes(len(data))
    return data


def _count_answer() -> None:
    _budget.answers_left -= 1
    if _budget.answers_left < 0:
        raise _too_large(f"{MAX_ANSWERS} answers")


def _counted(pieces: Iterable[bytes], weight: int) -> Iterator[bytes]:
    for piece in pieces:
        _count_bytes(weight * len(piece))
        yield piece


def _count_bytes(count: int) -> None:
    _budget.bytes_left -= count
    if _budget.bytes_left < 0:
        raise _too_large(f"{MAX_LISTING_BYTES // 1024**2} MiB")


def _too_large(limit: str) -> HubError:
    return HubError(
        f"The hub's listing of the repository has more than {limit}: nothing was downloaded. Check the name of the "
        "repository and the endpoint of the hub."
    )
