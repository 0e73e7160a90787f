"""Sends the requests of the soak test until each has its final response, and counts the outcomes."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from benchmarks.report import log_progress
from benchmarks.soak_client import BrokenConnectionError
from benchmarks.soak_requests import find_error

if TYPE_CHECKING:
    from benchmarks.soak_client import Client, Response
    from benchmarks.soak_requests import Pool, Request

RESPONSE_TIMEOUT_S = 90.0
"""More than the service's own timeout of one minute."""
_LOST_AFTER_S = 180.0
_MAX_PAUSE_S = 10.0
"""Longest pause before a request is repeated, even if `Retry-After` is longer, because the service may recover sooner."""
_MAX_EXAMPLES = 20
_OUTAGE_SLACK_S = 1.0
"""Requests that were sent this long after the end of an outage may still fail, because responses were on their way."""

Failure = Literal["503", "broken connection"]


@dataclass(slots=True)
class Outage:
    """A time during which requests may fail at first. Times are those of `time.monotonic`."""

    model: str
    """The model that is being reloaded. Empty: the process is being replaced, which breaks connections too."""
    start: float
    end: float = float("inf")


class Outages:
    """The outages that injected failures have caused."""

    def __init__(self) -> None:
        self._outages: list[Outage] = []

    def begin(self, model: str) -> Outage:
        """Add an outage. The caller sets its end."""
        outage = Outage(model, time.monotonic())
        self._outages.append(outage)
        return outage

    def explain(self, failure: Failure, model: str, sent: float) -> bool:
        """Return whether an outage since `sent` explains the failure of a request to a model."""
        return any(
            sent <= outage.end + _OUTAGE_SLACK_S and (not outage.model or (failure == "503" and outage.model == model))
            for outage in self._outages
        )


@dataclass(slots=True)
class Tally:
    """Counts of requests and their outcomes."""

    requests: int = 0
    expected: int = 0
    """Requests that got the expected response."""
    aborted: int = 0
    """Requests that the client aborted."""
    lost: int = 0
    wrong: int = 0
    unexpected: int = 0
    repeated: Counter[str] = field(default_factory=Counter)
    """Repetitions by reason."""
    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    """Descriptions of errors."""

    def fail(self, message: str) -> None:
        """Count unexpected behavior of the whole service."""
        self.unexpected += 1
        self.examples.append(message)
        log_progress(message)

    def add_example(self, error: str, request: Request, detail: str) -> None:
        target = request.model or request.path
        line = f"{error}: {request.kind} to {target}: {detail}"[:300]
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(line)
        log_progress(line)


class RequestSender:
    """Sends requests, repeats them if the service may ask for it, and checks the responses."""

    def __init__(self, client: Client, pool: Pool) -> None:
        self.client = client
        self.outages = Outages()
        self.tally = Tally()
        self._pool = pool
        self._queue_full_at: dict[str, float] = {}
        """When a model last responded with 429."""

    async def send(self, request: Request) -> None:
        """Send a request until it has a final response, and check that response."""
        tally = self.tally
        tally.requests += 1
        tally.kinds[request.kind] += 1
        if request.disconnect_after_s is not None:
            await self._send_and_disconnect(request, request.disconnect_after_s)
            return
        deadline = time.monotonic() + _LOST_AFTER_S
        number, attempt = tally.requests, 0
        while (sent := time.monotonic()) <= deadline:
            request_id = f"soak-{number}-{attempt}"
            attempt += 1
            try:
                response = await self.client.request(
                    request.method, request.path, request.body, request_id=request_id, send_s=request.send_s
                )
            except TimeoutError:
                tally.add_example("no response", request, f"none within {RESPONSE_TIMEOUT_S:g} s")
                break
            except BrokenConnectionError as error:
                if not self._explains_broken(request, sent, error):
                    return
                tally.repeated["connection broken by the end of the process"] += 1
                await asyncio.sleep(0.1)
                continue
            tally.statuses[response.status] += 1
            if (received_id := response.headers.get("x-request-id")) != request_id:
                tally.wrong += 1
                tally.add_example("wrong response", request, f"request id {received_id}")
                return
            pause_s = self._retry_pause_s(request, response, sent)
            if pause_s is None:
                self._check(request, response)
                return
            await asyncio.sleep(min(pause_s, _MAX_PAUSE_S))
        tally.lost += 1
        tally.add_example("lost", request, f"no final response within {_LOST_AFTER_S:g} s")

    async def _send_and_disconnect(self, request: Request, after_s: float) -> None:
        sent = time.monotonic()
        try:
            await self.client.disconnect_early(
                request.path, request.body, sent_share=request.sent_share, after_s=after_s
            )
        except BrokenConnectionError as error:
            if not self._explains_broken(request, sent, error):
                return
        self.tally.aborted += 1

    def _explains_broken(self, request: Request, sent: float, error: Exception) -> bool:
        """Return whether an outage explains a broken connection, and count it as unexpected if not."""
        if self.outages.explain("broken connection", request.model, sent):
            return True
        self.tally.unexpected += 1
        self.tally.add_example("connection broken", request, str(error))
        return False

    def _retry_pause_s(self, request: Request, response: Response, sent: float) -> float | None:
        """Return when to repeat the request, or None if the response is final."""
        repeated = self.tally.repeated
        if response.status == 504 and self._queue_full_at.get(request.model, 0.0) >= sent:
            repeated["504, and the queue was full meanwhile"] += 1
            return 1.0
        if response.status not in (429, 503):
            return None
        retry_after = response.headers.get("retry-after", "")
        if not (retry_after.isdecimal() and 1 <= int(retry_after) <= 120):
            return None
        if response.status == 429:
            repeated["429: the queue is full"] += 1
            self._queue_full_at[request.model] = time.monotonic()
        elif self.outages.explain("503", request.model, sent):
            repeated["503: the model is being reloaded"] += 1
        else:
            return None
        return float(retry_after)

    def _check(self, request: Request, response: Response) -> None:
        tally = self.tally
        if response.status != request.status:
            tally.unexpected += 1
            error = f"status {response.status} instead of {request.status}"
            tally.add_example(error, request, response.body[:200].decode("utf-8", "replace"))
        elif error := find_error(request, response, self._pool):
            tally.wrong += 1
            tally.add_example("wrong response", request, error)
        else:
            tally.expected += 1
