"""Asking a service in a soak until it has answered, and keeping count of how."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.progress import say
from benchmarks.soak_client import BrokenError
from benchmarks.soak_load import fault_of

if TYPE_CHECKING:
    from benchmarks.soak_client import Client, Reply
    from benchmarks.soak_faults import Disturbances, Excuse
    from benchmarks.soak_load import ManifestKey, Pool

ANSWER_WITHIN_S = 90.0
"""More than the service's own limit of a minute."""
_LOST_AFTER_S = 180.0
_LONGEST_PAUSE_S = 10.0
"""A client that is told to come back in 30 s does so sooner here: it shall find out that it may."""
_EXAMPLES = 20


@dataclass(slots=True)
class Tally:
    """What was seen."""

    requests: int = 0
    answered: int = 0
    """With what they should have been answered with."""
    hung_up: int = 0
    lost: int = 0
    wrong: int = 0
    unexpected: int = 0
    asked_again: Counter[str] = field(default_factory=Counter)
    """Times that an answer was put off, excusably."""
    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def fail(self, what: str) -> None:
        """Count what is unexpected of the service as a whole."""
        self.unexpected += 1
        self.examples.append(what)
        say(what)

    def note(self, what: str, question: ManifestKey, detail: str) -> None:
        if len(self.examples) < _EXAMPLES:
            self.examples.append(
                f"{what}: {question.kind} to {question.model or question.path}: {detail}"[:300]
            )
        say(f"{what}: {question.kind}: {detail}"[:300])


class Asker:
    """Asks questions, again where the service may ask for that, and holds the answers to what they must be."""

    def __init__(self, client: Client, pool: Pool, disturbances: Disturbances) -> None:
        self._client = client
        self._pool = pool
        self._disturbances = disturbances
        self._queue_was_full: dict[str, float] = {}
        """When a model last said so, by its alias."""
        self.tally = Tally()

    async def settle(self, question: ManifestKey) -> None:
        """Ask until there is an answer that is no excuse, and look at it."""
        tally = self.tally
        tally.requests += 1
        tally.kinds[question.kind] += 1
        if question.hangs_up_after_s is not None:
            await self._hang_up(question)
            return
        give_up_at = time.monotonic() + _LOST_AFTER_S
        number = tally.requests
        for attempt in range(1_000_000):
            sent = time.monotonic()
            if sent > give_up_at:
                break
            identifier = f"soak-{number}-{attempt}"
            try:
                reply = await self._client.ask(
                    question.method,
                    question.path,
                    question.body,
                    request_id=identifier,
                    takes_s=question.takes_s,
                )
            except TimeoutError:
                tally.note("no answer", question, f"none within {ANSWER_WITHIN_S:g} s")
                break
            except BrokenError as error:
                if not self._excused("broken", question, sent):
                    tally.unexpected += 1
                    tally.note("connection broken", question, str(error))
                    return
                tally.asked_again["connection broken by the death of the process"] += 1
                await asyncio.sleep(0.1)
                continue
            tally.statuses[reply.status] += 1
            if reply.headers.get("x-request-id") != identifier:
                tally.wrong += 1
                tally.note("wrong answer", question, f"request id {reply.headers.get('x-request-id')}")
                return
            if (pause_s := self._put_off(question, reply, sent)) is None:
                self._look_at(question, reply)
                return
            await asyncio.sleep(min(pause_s, _LONGEST_PAUSE_S))
        tally.lost += 1
        tally.note("lost", question, f"not answered within {_LOST_AFTER_S:g} s")

    async def _hang_up(self, question: ManifestKey) -> None:
        sent = time.monotonic()
        try:
            await self._client.hang_up(
                question.path, question.body, after_s=question.hangs_up_after_s or 0.0, sent=question.sent
            )
        except BrokenError as error:
            if not self._excused("broken", question, sent):
                self.tally.unexpected += 1
                self.tally.note("connection broken", question, str(error))
                return
        self.tally.hung_up += 1

    def _put_off(self, question: ManifestKey, reply: Reply, sent: float) -> float | None:
        """Return when to ask again where the service may ask for that, else None: this is the answer."""
        if reply.status == 504 and self._queue_was_full.get(question.model, 0.0) >= sent:
            self.tally.asked_again["504: its time was up, and the queue had been full meanwhile"] += 1
            return 1.0
        if reply.status not in (429, 503):
            return None
        after = reply.headers.get("retry-after", "")
        if not (after.isdecimal() and 1 <= int(after) <= 120):
            return None
        if reply.status == 429:
            self.tally.asked_again["429: the queue is full"] += 1
            self._queue_was_full[question.model] = time.monotonic()
        elif self._excused("503", question, sent):
            self.tally.asked_again["503: the model is loaded anew"] += 1
        else:
            return None
        return float(after)

    def _excused(self, what: Excuse, question: ManifestKey, sent: float) -> bool:
        return self._disturbances.excuse(what, question.model, sent, time.monotonic())

    def _look_at(self, question: ManifestKey, reply: Reply) -> None:
        tally = self.tally
        if reply.status != question.status:
            tally.unexpected += 1
            tally.note(
                f"status {reply.status} where {question.status} is due",
                question,
                reply.body[:200].decode("utf-8", "replace"),
            )
        elif fault := fault_of(question, reply, self._pool):
            tally.wrong += 1
            tally.note("wrong answer", question, fault)
        else:
            tally.answered += 1
