"""The live part of the overview: one rendering for all viewers, none without viewers, and no delay of the shutdown."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.api.console.charts import line_chart, shade
from emb_model_provider.api.console.sampler import Sampler
from tests.api.console.conftest import REMOTE, Open
from tests.service import Service

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.api.dependencies import Services


async def test_all_viewers_get_the_same_events(open_console: Open) -> None:
    """An event is rendered once a second and language, and nothing runs after the last viewer has left."""
    async with open_console() as (_, app):
        services: Services = app.state.services
        before = asyncio.all_tasks()
        sampler = Sampler(services)
        first, second = (sampler.events("en", lambda: False) for _ in range(2))
        chinese = sampler.events("zh", lambda: False)
        shown = await anext(first), await anext(second)
        assert shown[0] is shown[1]
        assert "内存".encode() in await anext(chinese)
        next_shown = await asyncio.gather(anext(first), anext(second))
        assert next_shown[0] is next_shown[1]
        assert next_shown[0] is not shown[0]
        for viewer in (first, second, chinese):
            await viewer.aclose()
        for _ in range(100):
            if asyncio.all_tasks() <= before:
                break
            await asyncio.sleep(0.1)
        assert asyncio.all_tasks() <= before


async def test_a_viewer_can_come_back(open_console: Open) -> None:
    async with open_console() as (_, app):
        sampler = Sampler(app.state.services)
        for _ in range(2):
            viewer = sampler.events("en", lambda: False)
            await anext(viewer)
            await anext(viewer)
            await viewer.aclose()
            await asyncio.sleep(1.5)


async def test_signing_out_ends_the_stream(open_console: Open) -> None:
    async with open_console(REMOTE, admin_api_keys="key") as (client, _):
        await client.post("/console/sign-in", data={"key": "key"})
        # This client returns a response when it is complete.
        stream = asyncio.create_task(client.get("/console/live"))
        await asyncio.sleep(0.5)
        assert not stream.done()
        await client.post("/console/sign-out")
        response = await asyncio.wait_for(stream, 60)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.content.startswith(b"data: ")
    assert response.content.endswith(b"\n\n")


@pytest.mark.slow
def test_an_open_stream_does_not_delay_the_shutdown(tmp_path: Path) -> None:
    """The grace period for requests is a minute."""
    with Service(tmp_path, PRELOAD_MODELS="none") as service:
        service.wait()
        with service.http.stream("GET", "/console/live") as stream:
            assert next(stream.iter_lines()).startswith("data: ")
            service.signal(signal.SIGTERM)
            started = time.monotonic()
            assert service.ended() == 0
    assert time.monotonic() - started < 40, "it waited for the end of the grace period"


def test_the_lines_of_a_chart() -> None:
    """The latest value is at the right, larger ones are higher, and gaps are skipped."""
    chart = line_chart([0.0, None, 3.0], [None, None, None])
    assert chart.top == 5
    assert chart.lines[0].points == f"0,{chart.height} {chart.width},{chart.height * 0.4:g}"
    assert chart.lines[1].points == chart.lines[1].area == ""
    assert line_chart([]).top == 1
    assert [line_chart([value]).top for value in (0.2, 0.21, 1, 7, 11, 100)] == [0.2, 0.5, 1, 10, 20, 100]


def test_the_shades_of_a_heat_map() -> None:
    assert [shade(cosine) for cosine in (-0.5, 0.0, 0.5, 1.0, 1.0000001)] == [0, 0, 5, 10, 10]
