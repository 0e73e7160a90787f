"""Prompts, dimensions and normalization, requested from an engine."""

from __future__ import annotations

import numpy as np
import pytest

from emb_model_provider.errors import DimensionsError, RequestError
from emb_model_provider.serving.request_options import choose_prompt, choose_task
from tests.serving.fakes import describe, expected
from tests.serving.helpers import ids, started_engine

pytestmark = pytest.mark.usefixtures("short_collections")


async def test_request_overrides_normalization_of_the_model() -> None:
    """`normalize` of the request takes precedence over the model."""
    async with started_engine(describe(normalize=True)) as run:
        assert np.linalg.norm(await run.embed("w1 w2")) == pytest.approx(1)
        assert (await run.embed("w1 w2", normalize=False)).tolist() == [expected(ids("w1", "w2"))]
    async with started_engine() as run:
        assert np.linalg.norm(await run.embed("w1 w2", normalize=True)) == pytest.approx(1)


async def test_truncated_vectors_are_normalized() -> None:
    """Declared and configured sizes are truncated and normalized. The native size is always accepted."""
    async with started_engine(describe(matryoshka=(2,)), dimensions=(3,)) as run:
        native = np.array(expected(ids("w1", "w2")), dtype=np.float32)
        for size in (2, 3):
            vector = (await run.embed("w1 w2", dimensions=size))[0]
            np.testing.assert_allclose(vector, native[:size] / np.linalg.norm(native[:size]), rtol=1e-6)
        assert (await run.embed("w1 w2", dimensions=4)).tolist() == [native.tolist()]
        for size in (1, 5):
            with pytest.raises(DimensionsError, match=r"allowed: 2, 3, 4"):
                await run.embed("w1", dimensions=size)


async def test_all_smaller_sizes_can_be_allowed() -> None:
    """`dimensions: any` allows every size up to the native one."""
    async with started_engine(dimensions="any") as run:
        assert (await run.embed("w1", dimensions=1)).shape == (1, 1)
        with pytest.raises(DimensionsError, match="1 to 4"):
            await run.embed("w1", dimensions=5)


async def test_prompt_is_put_before_each_input() -> None:
    """`input_type` names a prompt of the model or one of its synonyms."""
    prompts = {"query": "w90 ", "passage": "w91 "}
    async with started_engine(describe(prompts=prompts, default_prompt="passage")) as run:
        assert (await run.embed("w1", input_type="search_query")).tolist() == [expected(ids("w90", "w1"))]
        for name in ("document", "passage", "retrieval.passage"):
            assert (await run.embed("w1", input_type=name)).tolist() == [expected(ids("w91", "w1"))]
        assert (await run.embed("w1")).tolist() == [expected(ids("w91", "w1"))]
        with pytest.raises(RequestError, match=r"'query', 'passage'") as caught:
            await run.embed("w1", input_type="poem")
        assert caught.value.param == "input_type"


async def test_known_input_type_without_a_prompt_changes_nothing() -> None:
    """A model without prompts accepts the common names."""
    async with started_engine() as run:
        assert (await run.embed("w1", input_type="query")).tolist() == [expected(ids("w1"))]


ROUTES = {"query": describe(prompts={"query": "q "}), "document": describe()}


@pytest.mark.parametrize(
    ("input_type", "task"),
    [(None, "document"), ("query", "query"), ("search_query", "query"), ("passage", "document"), ("other", "document")],
)
def test_input_type_decides_the_route(input_type: str | None, task: str) -> None:
    """With the synonyms of prompts. Without one, the default route is taken."""
    assert choose_task(input_type, describe(routes=ROUTES, default_route="document")) == task


def test_input_type_is_required_without_a_default_route() -> None:
    """The message names the routes."""
    with pytest.raises(RequestError, match=r"input_type.*'query', 'document'"):
        choose_task(None, describe(routes=ROUTES))
    assert choose_task("query", describe(routes=ROUTES)) == "query"
    assert choose_task("query", describe()) is None


def test_the_name_of_a_route_is_an_input_type() -> None:
    """Also if there is no prompt of this name."""
    described = describe(routes={"code": describe(), "text": describe()}, default_route="text")
    assert choose_prompt("code", described) == ""
    with pytest.raises(RequestError, match="'code'"):
        choose_prompt("image", described)


QWEN = {"query": "Instruct: Find answers\nQuery:", "document": ""}


@pytest.mark.parametrize(
    ("prompts", "input_type", "expected"),
    [
        (QWEN, "query", "Instruct: Find duplicates\nQuery:"),
        (QWEN, None, "Instruct: Find duplicates\nQuery:"),
        ({"web": "Instruct: Find\nanswers\n Query: "}, "web", "Instruct: Find duplicates\n Query: "),
        ({"query": "<instruct>Find answers\n<query>"}, "search_query", "<instruct>Find duplicates\n<query>"),
        ({"query": "task: search result | query: "}, "query", "task: Find duplicates | query: "),
        ({"query": "query: "}, "query", "Find duplicates"),
        ({}, None, "Find duplicates"),
    ],
)
def test_instruction(prompts: dict[str, str], input_type: str | None, expected: str) -> None:
    """It replaces the instruction in a prompt of the model. If none contains one, it is the prompt."""
    assert choose_prompt(input_type, describe(prompts=prompts), "Find duplicates") == expected


def test_instruction_for_the_side_without_one_is_rejected() -> None:
    """It would change the vectors in a way that the model was not trained for."""
    with pytest.raises(RequestError, match=r"'document'.*with an instruction: \['query'\]") as caught:
        choose_prompt("document", describe(prompts=QWEN), "Find duplicates")
    assert caught.value.param == "instruction"


def test_tasks_of_other_apis_need_no_prompt() -> None:
    """A model that has a prompt for them uses it; any other one computes the same as without a task."""
    with_prompt = describe(prompts={"clustering": "cluster: ", "query": "query: "}, default_prompt="query")
    assert choose_prompt("clustering", with_prompt) == "cluster: "
    for task in ("classification", "text-matching", "separation", "code.query", "code.passage"):
        assert choose_prompt(task, with_prompt) == "query: "
        assert choose_prompt(task, describe()) == ""
