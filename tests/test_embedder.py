"""A model in a Python program: the service's engine behind plain calls."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from emb_model_provider import Embedder
from emb_model_provider.errors import (
    InputTooLongError,
    ModelNotReadyError,
    RepositoryNotFoundError,
    RequestError,
)
from emb_model_provider.hubs.local import find_bundled
from emb_model_provider.settings import Settings
from tests.service import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

TEXTS = ["hello", "你好,世界", "The quick brown fox jumps over the lazy dog.", "a " * 400, ""]


@pytest.fixture(scope="module")
def settings(service_cache: str) -> Settings:
    return Settings.from_values(cache_dir=service_cache)


@pytest.fixture(scope="module")
def embedder(settings: Settings) -> Iterator[Embedder]:
    with Embedder(settings=settings) as embedder:
        yield embedder


@pytest.fixture(scope="module")
def reference() -> NDArray[np.float32]:
    model = SentenceTransformer(str(find_bundled()), device="cpu")
    return np.asarray(model.encode(TEXTS))


def cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    return (left * right).sum(-1) / np.linalg.norm(left, axis=-1) / np.linalg.norm(right, axis=-1)


def test_its_vectors_are_those_of_sentence_transformers(
    embedder: Embedder, reference: NDArray[np.float32]
) -> None:
    """The vectors are the reference's, as float32 of shape (texts, dimensions)."""
    found = embedder.embed(TEXTS)
    assert (found.dtype, found.shape) == (np.float32, reference.shape)
    assert cosines(found, reference).min() > 0.999


def test_one_text_gives_one_vector_and_none_gives_none(embedder: Embedder) -> None:
    """A single str gives a vector, an empty list an empty matrix of the right width."""
    assert embedder.embed("hello").shape == (384,)
    assert embedder.embed([]).shape == (0, 384)
    assert embedder.description.dimension == 384


def test_a_list_longer_than_is_tokenized_at_a_time_keeps_its_order(embedder: Embedder) -> None:
    """Each of 2,600 texts has its own vector in its own place."""
    texts = [f"number {index}" for index in range(2600)]
    found = embedder.embed(texts)
    cache_locations = [0, 1, 1023, 1024, 1025, 2047, 2048, 2599]
    alone = embedder.embed([texts[place] for place in cache_locations])
    assert (found[cache_locations] @ alone.T).argmax(axis=1).tolist() == list(range(len(cache_locations)))
    assert cosines(found[cache_locations], alone).min() > 0.999


def test_threads_and_tasks_each_get_their_own_vectors(embedder: Embedder) -> None:
    """Eight threads and eight tasks embed at a time: everybody gets the vectors of their own texts."""
    words = [f"{word} {index}" for index in range(8) for word in ("apple", "river")]
    expected = embedder.embed(words)
    with ThreadPoolExecutor(8) as threads:
        from_threads = np.stack(list(threads.map(embedder.embed, words)))

    async def all_at_once() -> NDArray[np.float32]:
        return np.stack(await asyncio.gather(*(embedder.aembed(word) for word in words)))

    assert cosines(from_threads, expected).min() > 0.999
    assert cosines(asyncio.run(all_at_once()), expected).min() > 0.999


def test_what_cannot_be_asked_is_told(embedder: Embedder) -> None:
    """A wrong option, a text that is too long and may not be cut, and what is no text: an error each, at once."""
    with pytest.raises(RequestError, match="input_type"):
        embedder.embed(["a"], input_type="nonsense")
    with pytest.raises(InputTooLongError, match=r"input\[1\]"):
        embedder.embed(["short", "long " * 1000], truncate="NONE")
    with pytest.raises(TypeError, match=r"texts\[1\] is int"):
        embedder.embed(["a", 1])  # type: ignore[list-item]
    assert embedder.embed("still here").shape == (384,)


def test_closing_ends_its_threads_and_loading_again_works(settings: Settings) -> None:
    """A closed embedder leaves no thread behind, says that it is not loaded, and can be loaded again."""
    before = set(threading.enumerate())
    embedder = Embedder(settings=settings)
    with pytest.raises(ModelNotReadyError, match="load"):
        embedder.embed("too early")
    with embedder:
        first = embedder.embed("hello")
    wait_until(lambda: set(threading.enumerate()) <= before)
    with pytest.raises(ModelNotReadyError):
        embedder.embed("too late")
    assert cosines(embedder.load().embed("hello"), first) > 0.999
    embedder.close()
    embedder.close()


def test_closing_while_somebody_embeds_leaves_nobody_waiting(settings: Settings) -> None:
    """Who asks at the very moment that it is closed is told that it is not loaded, as who asks later is."""

    class Unlucky(Embedder):
        def _loaded(self) -> Any:
            running = super()._loaded()
            self.close()
            return running

    with Unlucky(settings=settings) as embedder, pytest.raises(ModelNotReadyError, match="load"):
        embedder.embed("too late")


async def test_it_can_be_used_on_an_event_loop(settings: Settings) -> None:
    """`async with` loads and closes without holding up the loop; a call that is cancelled leaves the others alone."""
    async with Embedder(settings=settings) as embedder:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.create_task(tick())
        long = asyncio.create_task(embedder.aembed(["word " * 200] * 3000))
        short = await embedder.aembed("hello")
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        assert (await embedder.aembed(["hello"])).shape == (1, 384)
        assert short.shape == (384,)
        ticking.cancel()
        assert ticks > 0


def test_a_model_that_is_not_there_says_so(settings: Settings, tmp_path: Path) -> None:
    """The reason that a model cannot be had is raised as it is, and can be tried again."""
    embedder = Embedder(str(tmp_path / "nowhere"), source="local", settings=settings)
    for _ in range(2):
        with pytest.raises(RepositoryNotFoundError, match="does not exist"):
            embedder.load()
