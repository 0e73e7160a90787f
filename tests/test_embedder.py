"""The public class `Embedder`."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from emb_model_provider import Embedder
from emb_model_provider.errors import (
    ForkedProcessError,
    InputTooLongError,
    ModelNotReadyError,
    RepositoryNotFoundError,
    RequestError,
)
from emb_model_provider.hubs.local import find_bundled
from emb_model_provider.serving.engine import EmbedOptions
from emb_model_provider.settings import Settings
from tests.service import wait_until
from tests.serving.helpers import started_engine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

pytestmark = pytest.mark.usefixtures("short_collections")

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


def test_vectors_are_those_of_sentence_transformers(embedder: Embedder, reference: NDArray[np.float32]) -> None:
    """They are float32 of shape (texts, dimensions)."""
    vectors = embedder.embed(TEXTS)
    assert (vectors.dtype, vectors.shape) == (np.float32, reference.shape)
    assert cosines(vectors, reference).min() > 0.999


def test_alias_fixes_the_prompt(service_cache: str) -> None:
    """The `input_type` of an alias applies, unless a call has one."""
    entry = {"name": "sentence-transformers/all-MiniLM-L6-v2", "prompts": {"query": "query: ", "document": "passage: "}}
    mapping = {"plain": entry, "for-queries": {**entry, "input_type": "query"}}
    settings = Settings.from_values(cache_dir=service_cache, model_mapping=mapping)
    with Embedder("for-queries", settings=settings) as embedder:
        assert cosines(embedder.embed("hello"), embedder.embed("hello", input_type="query")) > 0.9999
        assert cosines(embedder.embed("hello"), embedder.embed("hello", input_type="document")) < 0.99


def test_shape_of_one_text_and_of_no_texts(embedder: Embedder) -> None:
    """A single str returns a vector, and an empty list an empty matrix of the right width."""
    assert embedder.embed("hello").shape == (384,)
    assert embedder.embed([]).shape == (0, 384)
    assert embedder.description.dimension == 384


def test_long_list_keeps_its_order(embedder: Embedder) -> None:
    """More texts than are tokenized at once get their vectors in order."""
    texts = [f"number {index}" for index in range(2600)]
    vectors = embedder.embed(texts)
    rows = [0, 1, 1023, 1024, 1025, 2047, 2048, 2599]
    expected = embedder.embed([texts[row] for row in rows])
    assert (vectors[rows] @ expected.T).argmax(axis=1).tolist() == list(range(len(rows)))
    assert cosines(vectors[rows], expected).min() > 0.999


def test_concurrent_calls_get_their_own_vectors(embedder: Embedder) -> None:
    """Each of several concurrent threads and tasks gets the vectors of its texts."""
    words = [f"{word} {index}" for index in range(8) for word in ("apple", "river")]
    expected = embedder.embed(words)
    with ThreadPoolExecutor(8) as threads:
        from_threads = np.stack(list(threads.map(embedder.embed, words)))

    async def embed_concurrently() -> NDArray[np.float32]:
        return np.stack(await asyncio.gather(*(embedder.aembed(word) for word in words)))

    assert cosines(from_threads, expected).min() > 0.999
    assert cosines(asyncio.run(embed_concurrently()), expected).min() > 0.999


def test_invalid_arguments_raise(embedder: Embedder) -> None:
    """An unknown prompt, a text that is too long and an input that is not a text raise. The next call works."""
    with pytest.raises(RequestError, match="input_type"):
        embedder.embed(["a"], input_type="nonsense")
    with pytest.raises(InputTooLongError, match=r"input\[1\]"):
        embedder.embed(["short", "long " * 1000], truncate="NONE")
    with pytest.raises(InputTooLongError, match=r"input\[2047\]"):
        embedder.embed([*["short"] * 2047, "long " * 1000], truncate="NONE")
    with pytest.raises(TypeError, match=r"texts\[1\] must be a str, not int"):
        embedder.embed(["a", 1])  # type: ignore[list-item]
    assert embedder.embed("still here").shape == (384,)


def test_close_ends_all_threads_and_load_works_again(settings: Settings) -> None:
    """A closed embedder has no threads, raises an error that names `load`, and can be loaded again."""
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


def test_calls_during_close_do_not_wait_forever(settings: Settings) -> None:
    """Threads that embed while the embedder is closed get vectors or an error that says so."""

    def embed_until_closed() -> ModelNotReadyError:
        while True:
            try:
                assert embedder.embed("hello").shape == (384,)
            except ModelNotReadyError as error:
                return error

    embedder = Embedder(settings=settings).load()
    with ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(embed_until_closed) for _ in range(8)]
        embedder.close()
        errors = [str(call.result(timeout=60)) for call in calls]
    assert all("load()" in error or "shutting down" in error for error in errors)


async def test_embedder_does_not_block_an_event_loop(settings: Settings) -> None:
    """`async with` loads and closes it, and a cancelled call does not affect others."""
    async with Embedder(settings=settings) as embedder:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.create_task(tick())
        long = asyncio.create_task(embedder.aembed([f"{n} " + "word " * 199 for n in range(3000)]))
        short = await embedder.aembed("hello")
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        assert (await embedder.aembed(["hello"])).shape == (1, 384)
        assert short.shape == (384,)
        ticking.cancel()
        assert ticks > 0


def test_missing_model_raises_its_error(settings: Settings, tmp_path: Path) -> None:
    """`load` raises the error of the hub, and can be called again."""
    embedder = Embedder(str(tmp_path / "nowhere"), source="local", settings=settings)
    for _ in range(2):
        with pytest.raises(RepositoryNotFoundError, match="does not exist"):
            embedder.load()


FORK = """
import asyncio, json, os, sys
import numpy as np
from emb_model_provider import Embedder
from emb_model_provider.management.downloads import DownloadJobs
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.settings.loading import load_settings

embedder, unused = Embedder().load(), Embedder()
jobs = DownloadJobs(ModelManager(load_settings()[0]))
before = embedder.embed("hello")
reader, writer = os.pipe()
if os.fork() == 0:
    calls = {
        "embed": lambda: embedder.embed("hello"),
        "aembed": lambda: asyncio.run(embedder.aembed("hello")),
        "description": lambda: embedder.description,
        "load": embedder.load,
        "load of another": unused.load,
        "load of a new one": lambda: Embedder().load(),
        "jobs": jobs.list,
        "close": embedder.close,
        "close of another": unused.close,
    }
    results = {}
    for name, call in calls.items():
        try:
            call()
            results[name] = "done"
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    os.write(writer, json.dumps(results).encode())
    os._exit(0)
os.close(writer)
with os.fdopen(reader) as stream:
    print(stream.read())
assert np.allclose(embedder.embed("hello"), before, atol=1e-3)
embedder.close()
"""


def test_forked_process_gets_an_error_at_once(service_cache: str) -> None:
    """As with gunicorn --preload or Celery: no call waits for ever in the child, and the parent is not affected."""
    environment = os.environ | {"EMB_PROVIDER_CACHE_DIR": service_cache}
    done = subprocess.run(
        [sys.executable, "-c", FORK], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert (results.pop("close"), results.pop("close of another")) == ("done", "done")
    for result in results.values():
        assert result.startswith("ForkedProcessError: "), results
        assert "post_fork" in result
        assert "worker_process_init" in result


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
async def test_forked_engine_gets_an_error_at_once() -> None:
    """An engine without an Embedder around it."""
    async with started_engine() as run:
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            try:
                run.engine.embed(["w1"], EmbedOptions()).send(None)
            except ForkedProcessError:
                os.write(writer, b"refused")
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as stream:
            assert stream.read() == "refused"
        os.waitpid(child, 0)  # noqa: ASYNC222 - it has ended
        assert len(await run.embed("w1")) == 1
