"""The log lines of a model that has been loaded."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from emb_model_provider.model_spec import BUNDLED_MODEL
from tests.serving.fakes import describe

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

PREFIX = "2026-01-01 00:00:00.000 INFO    "


async def test_ready_line_is_short_and_details_are_debug(
    fleet: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The line of the bundled model has at most 120 columns, including time and level."""
    caplog.set_level(logging.DEBUG, logger="emb_model_provider")
    async with fleet(BUNDLED_MODEL) as models:
        models[BUNDLED_MODEL].description = describe(dimension=384, precision="bf16")
        await models.registry.load(BUNDLED_MODEL)
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    ((level, ready),) = [line for line in lines if "is ready" in line[1]]
    assert level == "INFO"
    assert re.fullmatch(rf"model {BUNDLED_MODEL} is ready: 384-dim bf16, 210 MB, \d\.\d s", ready)
    assert len(PREFIX + ready) <= 120
    (details,) = [message for level, message in lines if level == "DEBUG" and "pooling" in message]
    for part in ("at local from local", "torch on cpu", "max 16 tokens", "mean pooling", "not measured"):
        assert part in details


async def test_only_notes_that_need_attention_are_warnings(
    fleet: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """How a ModelScope model is loaded is information. Weights that PyTorch must read are a warning."""
    caplog.set_level(logging.INFO, logger="emb_model_provider")
    declared, weights = (
        "pooling and maximum length are those of configuration.json",
        "only .bin weights: read with care",
    )
    async with fleet("a") as models:
        models["a"].description = describe(notes=(declared, weights))
        await models.registry.load("a")
    levels = {record.getMessage(): record.levelname for record in caplog.records}
    assert levels[f"model a: {declared}"] == "INFO"
    assert levels[f"model a: {weights}"] == "WARNING"
