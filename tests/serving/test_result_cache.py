"""Identical inputs are computed once, and recent vectors are kept."""

from __future__ import annotations

import tracemalloc

import numpy as np

from emb_model_provider.serving.result_cache import Lookup, ModelResults, ResultCache

DIMENSION = 4


def vectors(*values: float) -> np.ndarray:
    return np.repeat(np.array(values, dtype=np.float32)[:, np.newaxis], DIMENSION, axis=1)


def look_up(
    results: ModelResults, *rows: list[int], prompt_lengths: list[int] | None = None, task: str | None = None
) -> Lookup:
    return results.look_up(rows, prompt_lengths or [0] * len(rows), task)


def first_values(array: np.ndarray) -> list[float]:
    return array[:, 0].tolist()


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
    computed = np.random.default_rng(0).standard_normal((3, DIMENSION)).astype(np.float32)
    assert look_up(results, [1], [2], [3]).complete(computed) is computed
    lookup = look_up(results, [3], [9], [1], [3])
    assert (lookup.rows, lookup.hits) == ([1], 2)
    again = lookup.complete(vectors(7))
    assert [row.tobytes() for row in again] == [row.tobytes() for row in (computed[2], vectors(7)[0], computed[0], computed[2])]  # fmt: skip
    everything = look_up(results, [1], [2])
    assert everything.rows == []
    assert everything.complete(np.empty((0, DIMENSION), np.float32)).tobytes() == computed[:2].tobytes()


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
    cache = ResultCache(3 * 440)
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
        look_up(results, row).complete(np.full((1, DIMENSION), number, dtype=np.float32))
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 0.6 * limit < used < 1.05 * limit
    assert cache.size_bytes <= limit
