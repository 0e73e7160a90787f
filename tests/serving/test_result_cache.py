"""Identical inputs are computed once, and recent vectors are kept."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
import pytest

from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.errors import InferenceError
from emb_model_provider.serving.engine import EmbedOptions
from emb_model_provider.serving.jobs import in_background
from emb_model_provider.serving.result_cache import Lookup, ModelResults, ResultCache
from tests.serving.fakes import FAILS, expected
from tests.serving.helpers import ids, started_engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emb_model_provider.backends.base import Row
    from emb_model_provider.serving.jobs import BatchRecord

pytestmark = pytest.mark.usefixtures("short_collections")

DIMENSION = 4


def vectors(*values: float) -> list[tuple[np.ndarray]]:
    """Return the results of inputs with one output: a vector that has one value only."""
    return [(np.full(DIMENSION, value, dtype=np.float32),) for value in values]


def look_up(
    results: ModelResults, *rows: list[int], prompt_lengths: list[int] | None = None, task: str | None = None
) -> Lookup:
    tasks = [task] * len(rows) if task is not None else None
    batch = TokenBatch(ids=rows, prompt_lengths=prompt_lengths or [0] * len(rows), tasks=tasks)
    return results.look_up(batch, ("dense",))


def first_values(results: Sequence[tuple[Row, ...]]) -> list[float]:
    return [float(vector[0]) for (vector,) in results]  # type: ignore[index]  # all are arrays


def test_identical_inputs_are_computed_once() -> None:
    """Also without a cache. The vectors have the order of the inputs."""
    results = ResultCache(0).open()
    lookup = look_up(results, [1, 2], [3], [1, 2], [1], [3])
    assert lookup.rows == [0, 1, 3]
    assert first_values(lookup.complete(vectors(10, 20, 30))) == [10, 20, 10, 30, 20]
    assert look_up(results, [1, 2]).rows == [0]


def test_kept_vectors_are_bit_identical() -> None:
    """To those that were computed, in any combination with other inputs."""
    results = ResultCache(100_000).open()
    computed = [(row,) for row in np.random.default_rng(0).standard_normal((3, DIMENSION)).astype(np.float32)]
    assert look_up(results, [1], [2], [3]).complete(computed) is computed
    lookup = look_up(results, [3], [9], [1], [3])
    assert (lookup.rows, lookup.hits) == ([1], 2)
    again = lookup.complete(vectors(7))
    expected_rows = (computed[2], vectors(7)[0], computed[0], computed[2])
    assert [row.tobytes() for (row,) in again] == [row.tobytes() for (row,) in expected_rows]
    everything = look_up(results, [1], [2])
    assert everything.rows == []
    assert [row.tobytes() for (row,) in everything.complete([])] == [row.tobytes() for (row,) in computed[:2]]


def test_only_the_same_input_is_a_hit() -> None:
    """Not other ids with the same beginning, another task, another prompt, or another model."""
    cache = ResultCache(100_000)
    results = cache.open()
    look_up(results, [1, 2, 3]).complete(vectors(1))
    assert look_up(results, [1, 2, 3]).rows == []
    assert look_up(results, [1, 2]).rows == [0]
    assert look_up(results, [1, 2, 3, 0]).rows == [0]
    assert look_up(results, [1, 2, 3], task="query").rows == [0]
    assert look_up(results, [1, 2, 3], prompt_lengths=[1]).rows == [0]
    assert look_up(cache.open(), [1, 2, 3]).rows == [0]


def test_the_least_recently_used_vectors_are_removed() -> None:
    cache = ResultCache(3 * 640)
    results = cache.open()
    for value in (1, 2, 3):
        look_up(results, [value]).complete(vectors(value))
    look_up(results, [1])
    look_up(results, [4]).complete(vectors(4))
    assert [look_up(results, [value]).hits for value in (1, 2, 3, 4)] == [1, 0, 1, 1]


def test_a_vector_that_is_larger_than_the_cache_is_not_kept() -> None:
    cache = ResultCache(100)
    results = cache.open()
    assert first_values(look_up(results, [1]).complete(vectors(1))) == [1]
    assert look_up(results, [1]).hits == 0
    assert cache.size_bytes == 0


def test_a_closed_model_has_no_results() -> None:
    """Not those of requests that were running when it was closed, either. Other models keep theirs."""
    cache = ResultCache(100_000)
    closed, other = cache.open(), cache.open()
    look_up(closed, [1]).complete(vectors(1))
    look_up(other, [1]).complete(vectors(2))
    running = look_up(closed, [2])
    closed.close()
    assert first_values(running.complete(vectors(3))) == [3]
    assert look_up(closed, [1], [2]).hits == 0
    assert look_up(other, [1]).hits == 1


def test_memory_is_bounded() -> None:
    """By the limit, whatever the length of the inputs."""
    limit = 2_000_000
    cache = ResultCache(limit)
    results = cache.open()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(20_000):
        row = [number] * (1 + number % 100)
        look_up(results, row).complete(vectors(number))
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 0.6 * limit < used < 1.05 * limit
    assert cache.size_bytes <= limit


# --- in an engine -------------------------------------------------------------------------------------


def engine_config() -> tuple[dict[str, object], ResultCache, list[tuple[int, int]]]:
    """Return the configuration of an engine with a cache, the cache, and the hits and misses of each request."""
    cache, lookups = ResultCache(100_000), []  # type: ignore[var-annotated]
    return {"result_cache": cache, "on_lookup": lambda _, hits, misses: lookups.append((hits, misses))}, cache, lookups


async def test_an_engine_does_not_compute_kept_vectors() -> None:
    """Other options of a request change what is made of the vectors. The tokens of all inputs count."""
    config, _, lookups = engine_config()
    async with started_engine(config=config) as run:
        first = await run.embed("w1", "w2", "w1")
        again = await run.engine.embed(["w2", "w3", "w1"], EmbedOptions())
        scaled = await run.embed("w1", normalize=True)
    assert [sorted(batch) for batch in run.backend.batches] == [[ids("w1"), ids("w2")], [ids("w3")]]
    assert first.tolist() == [expected(ids(word)) for word in ("w1", "w2", "w1")]
    assert again.vectors.tolist() == [expected(ids(word)) for word in ("w2", "w3", "w1")]
    assert again.tokens == 9
    assert np.linalg.norm(scaled) == pytest.approx(1)
    assert lookups == [(0, 2), (2, 1), (1, 0)]


async def test_results_of_background_requests_are_not_kept() -> None:
    """They would displace those that are requested again. Kept ones are used."""
    config, _, lookups = engine_config()
    async with started_engine(config=config) as run:
        with in_background():
            await run.embed("w1")
        await run.embed("w1")
        with in_background():
            await run.embed("w1")
    assert lookups == [(0, 1), (0, 1), (1, 0)]


async def test_results_do_not_outlive_the_model() -> None:
    """They are dropped when it is loaded again after a crash, and when it is unloaded."""
    config, cache, lookups = engine_config()
    crashes = [False, True]

    def crash_second_batch(_: BatchRecord) -> None:
        if crashes and crashes.pop(0):
            raise SystemExit(1)

    async with started_engine(config=config, on_batch=crash_second_batch) as run:
        await run.embed("w1")
        await run.embed("w2")
        assert len(run.backends) == 2
        await run.embed("w1")
        assert cache.size_bytes > 0
    assert lookups[-1] == (0, 1)
    assert cache.size_bytes == 0


async def test_a_failed_request_is_not_kept() -> None:
    config, cache, _ = engine_config()
    async with started_engine(config=config) as run:
        with pytest.raises(InferenceError):
            await run.embed("w1", FAILS)
        assert cache.size_bytes == 0


async def test_identical_inputs_of_a_batch_are_computed_once() -> None:
    """Also if they belong to different requests."""
    async with started_engine() as run:
        holding = await run.hold()
        tasks = [asyncio.create_task(run.embed(word)) for word in ("w2", "w3", "w2", "w2")]
        await run.until_waiting(4)
        run.backend.gate.set()
        await holding
        results = [(await task).tolist() for task in tasks]
    assert results == [[expected(ids(word))] for word in ("w2", "w3", "w2", "w2")]
    assert sorted(map(len, run.backend.batches)) == [1, 2]
