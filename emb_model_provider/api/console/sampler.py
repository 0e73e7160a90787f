"""The live part of the overview: rendered once a second for all viewers, and not at all without viewers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import psutil
from fastapi.sse import format_sse_event

from emb_model_provider.api.console.charts import line_chart
from emb_model_provider.api.console.rendering import render
from emb_model_provider.observability.activity import PERIOD_S, RECENT_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from emb_model_provider.api.console.texts import Language
    from emb_model_provider.api.dependencies import Services

_EVERY_S = 1.0
_POLL_S = 0.25


class Sampler:
    """Sends the live part of the overview to all browsers that show it. Used on one event loop."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._viewers = 0
        self._task: asyncio.Task[None] | None = None
        self._tick = asyncio.Event()
        self._events: dict[Language, bytes] = {}
        """The events of this second, by language."""

    async def events(self, language: Language, is_over: Callable[[], bool]) -> AsyncIterator[bytes]:
        """Yield a server-sent event each second, until the client disconnects or the service shuts down."""
        self._viewers += 1
        if self._task is None:
            self._events.clear()
            self._task = asyncio.create_task(self._run())
        try:
            while not is_over():
                yield self._event(language)
                await self._tick.wait()
        finally:
            self._viewers -= 1

    def _event(self, language: Language) -> bytes:
        event = self._events.get(language)
        if event is None:
            html = render("_live.html", language, **live_values(self._services))
            event = self._events[language] = format_sse_event(data_str=html)
        return event

    async def _run(self) -> None:
        background = self._services.background
        loop = asyncio.get_running_loop()
        while self._viewers:
            ends = loop.time() + _EVERY_S
            # An open stream would delay the shutdown.
            while loop.time() < ends and not background.is_shutting_down():  # noqa: ASYNC110 - a shutdown has no event
                await asyncio.sleep(_POLL_S)
            self._events.clear()
            tick, self._tick = self._tick, asyncio.Event()
            tick.set()
            if background.is_shutting_down():
                break
        self._task = None


def live_values(services: Services) -> dict[str, Any]:
    """Return what the live part of the overview shows."""
    activity, statuses = services.metrics.activity, services.registry.statuses()
    history = activity.history()
    return {
        "figures": activity.figures(),
        "recent_s": RECENT_S,
        "period_s": PERIOD_S,
        "steps": activity.history(PERIOD_S, RECENT_S),
        "rate_chart": line_chart([each.requests_per_s for each in history]),
        "latency_chart": line_chart(
            [each.p95_s * 1000 if each.p95_s is not None else None for each in history],
            [each.p50_s * 1000 if each.p50_s is not None else None for each in history],
        ),
        "statuses": statuses,
        "failures": activity.failures(),
        "resident_bytes": psutil.Process().memory_info().rss,
        "models_bytes": sum(status.memory_bytes or 0 for status in statuses),
        "memory": services.settings.memory,
    }
