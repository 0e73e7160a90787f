"""The log lines of a model that has been loaded, and the input types of its aliases."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.errors import LoadError
from emb_model_provider.model_spec import BUNDLED_MODEL, ModelSpec, RequestDefaults
from tests.registry.helpers import FakeModel
from tests.serving.fakes import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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


def with_input_types(aliases: Mapping[str, str | None]) -> dict[str, RequestDefaults]:
    return {alias: RequestDefaults(input_type=input_type) for alias, input_type in aliases.items()}


@pytest.mark.parametrize(
    ("prompts", "names"),
    [({"query": "w1 ", "summary": "w2 "}, "'query', 'summary'"), ({}, "none")],
    ids=["some", "none"],
)
async def test_input_type_of_an_alias_is_checked(
    fleet: Callable[..., Any], prompts: dict[str, str], names: str
) -> None:
    """A model whose alias has an unknown `input_type` fails to load, and the error names the prompts of the model."""
    async with fleet("other") as models:
        models.models["bge"] = FakeModel()
        models["bge"].description = describe(prompts=prompts)
        models.registry.add(
            ModelSpec(alias="bge", name="bge", more_aliases=with_input_types({"bge-q": "query", "bge-s": "sumary"}))
        )
        with pytest.raises(LoadError, match=f"alias bge-s has input_type 'sumary'.*Its prompts: {names}") as caught:
            await models.registry.load("bge")
        assert models.registry.status("bge").error == caught.value.message
        assert models["bge"].in_memory == 0
        assert (await models.embed("other")).shape == (1, 4)


async def test_input_types_that_requests_can_have(fleet: Callable[..., Any]) -> None:
    """The names of prompts, their synonyms, and tasks for which a model needs no prompt."""
    async with fleet("other") as models:
        models.models["bge"] = FakeModel()
        models["bge"].description = describe(prompts={"query": "w1 "})
        aliases = {f"bge-{name}": name for name in ("query", "search_query", "passage", "clustering")}
        models.registry.add(
            ModelSpec(alias="bge", name="bge", more_aliases=with_input_types({**aliases, "plain": None}))
        )
        await models.registry.load("bge")
