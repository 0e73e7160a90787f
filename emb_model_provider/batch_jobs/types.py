"""What answers the lines of batches, and the limits of files and batches. Imports no library of the database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Protocol, TypeVar, get_args

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

T = TypeVar("T")

Endpoint = Literal["/v1/embeddings", "/v1/rerank"]
ENDPOINTS: Final[tuple[Endpoint, ...]] = get_args(Endpoint)
BatchState = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
UNFINISHED: Final[tuple[BatchState, ...]] = ("validating", "in_progress", "finalizing", "cancelling")
COMPLETION_WINDOWS: Final = {"24h": 24 * 3600}
"""How long a batch may take, in seconds."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a line."""

    status_code: int
    body: bytes
    """JSON."""
    tokens: int = 0
    """Tokens of the inputs."""


class Calculator(Protocol):
    """Answers the lines of batches."""

    def check(self, endpoint: str, body: Mapping[str, Any]) -> int:
        """Return the number of inputs of a line. Called on a thread of its own.

        Raises:
            RequestError: An interactive request with this body would be refused.
            RetryLaterError: It cannot be said now, for example because the model is not loaded.
        """

    async def answer(self, endpoint: str, body: Mapping[str, Any], request_id: str) -> Answer:
        """Compute a line.

        Args:
            endpoint: The route.
            body: The body of the request.
            request_id: Identifies the line. It is the same if the line is computed again, so that ids in the body of the
                answer can be derived from it.

        Raises:
            RetryLaterError: The line cannot be answered now, and is computed again later.
            ProviderError: Any other failure. Its code and status go to the error file.
        """

    def group(self, endpoint: str, bodies: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Divide lines into groups that can be computed together. Returns the positions of the lines of each group."""

    async def answer_group(self, endpoint: str, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Compute the lines of a group of several ones, with the results that each of them has alone.

        Errors are those of `answer`. Any line of the group can be their cause.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a file and a batch may contain."""

    max_lines: int = 50_000
    max_inputs: int = 50_000
    max_line_bytes: int = 32_000_000
    """Longest line, which an interactive request could not exceed either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """How a worker divides its work and waits. Times in seconds."""

    parallel: int = 2
    """Chunks at a time, so that one is tokenized while another computes."""
    chunk_inputs: int = 256
    chunk_bytes: int = 4_000_000
    """A chunk ends when it has this many inputs or bytes."""
    lease_s: float = 60.0
    """How long a chunk belongs to a worker that does not renew its lease."""
    heartbeat_s: float = 2.0
    """How often leases are renewed, and cancelled batches noticed. At most a third of `lease_s`."""
    poll_s: float = 5.0
    """How often a worker without work looks for work of other processes."""
    pause_s: float = 10.0
    """How often a worker tries again to write to a disk that is full, or to reach the database."""
    stall_s: float = 60.0
    """If the remaining lines of a chunk have to be tried again for this long, the others are recorded, its lease is returned, and
    other chunks are computed."""
    max_wait_s: float = 6 * 3600
    """Lines that could not be computed for this long fail."""
    grace_s: float = 5.0
    """How long chunks may still be computed after their batch was cancelled or has expired. Less than `lease_s`."""
    sweep_s: float = 3600.0
    """How often expired files and the segments of interrupted work are removed."""
    retention_s: float | None = None
    """How long batches are kept after they have ended, in seconds. None: for ever."""
    min_free_bytes: int = 64_000_000
    """A worker writes no results while the disk has less space."""


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a list."""

    items: tuple[T, ...]
    has_more: bool
