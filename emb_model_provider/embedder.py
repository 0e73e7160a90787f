"""A model in a Python program, without a server: the engine that the service runs, behind plain calls."""

from __future__ import annotations

import asyncio
import threading
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from emb_model_provider.errors import ModelNotReadyError
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.model_resolver import resolve_model
from emb_model_provider.registry import Registry, RegistryConfig
from emb_model_provider.serving.engine import EmbedOptions
from emb_model_provider.settings import ServedModels
from emb_model_provider.settings.loading import load_settings

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from concurrent.futures import Future
    from types import TracebackType

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import ModelDescription
    from emb_model_provider.model_spec import BackendName, ModelSpec, Precision, Source, Truncate
    from emb_model_provider.settings import Settings

T = TypeVar("T")

_CHUNK = 1024
"""Texts that are tokenized at a time: all of a corpus at once would take its memory several times over."""
_NO_LIMIT = 2**62
_FOREVER_S = 1e9


class Embedder:
    """One model, loaded in this process.

        with Embedder("damo/nlp_gte_sentence-embedding_chinese-base", precision="bf16") as embedder:
            vectors = embedder.embed(["你好", "hello"])

    Files are fetched and compiled when they are not here, as the service does it, under the same settings
    (EMB_PROVIDER_... variables and .env) and in the same caches. `async with` and `aembed` are for programs with an
    event loop. Any number of threads and tasks may embed at a time: their texts share batches.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        source: Source | None = None,
        revision: str | None = None,
        precision: Precision | None = None,
        device: str | None = None,
        backend: BackendName | None = None,
        settings: Settings | None = None,
    ) -> None:
        """Choose the model; nothing is loaded yet.

        `model`: an alias of the settings, a repository's id, or a directory; None is the settings' first model. What
        is given here wins over the settings. `settings` None reads them from the environment and .env.

        Raises: SettingsError.
        """
        self._settings = settings if settings is not None else load_settings()[0]
        name = model if model is not None else self._settings.models.specs()[0].alias
        spec = resolve_model(self._settings, name, source=source, revision=revision, precision=precision)
        changes: dict[str, Any] = {"device": device, "backend": backend}
        self.spec: ModelSpec = replace(
            spec, **{key: value for key, value in changes.items() if value is not None}
        )
        self._running: _Running | None = None
        self._starting = threading.Lock()

    # --- from loading to closing ----------------------------------------------------------------------

    def load(self) -> Self:
        """Fetch, compile and load the model, as far as that is not done yet. Blocks; calling it again does nothing.

        Raises: HubError, LoadError, ModelNotReadyError, each with what to do.
        """
        with self._starting:
            if self._running is None:
                running = _Running(self.spec, self._settings)
                try:
                    running.call(running.load())
                except BaseException:
                    running.close()
                    raise
                self._running = running
                # For programs that forget it without closing it. On a thread, since garbage may be collected on the
                # very one that closing waits for; not at the interpreter's end, when no thread can be started.
                weakref.finalize(self, _close_elsewhere, running).atexit = False
        return self

    def close(self) -> None:
        """Finish what was asked, then free the model. Calling it again does nothing; `load` may follow."""
        with self._starting:
            running, self._running = self._running, None
        if running is not None:
            running.close()

    def __enter__(self) -> Self:
        return self.load()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.load)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    # --- embedding ------------------------------------------------------------------------------------

    @property
    def description(self) -> ModelDescription:
        """What is known of the loaded model: dimension, max_length, precision, fidelity, ….

        Raises: ModelNotReadyError where it is not loaded.
        """
        return self._loaded().description

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        input_type: str | None = None,
        truncate: Truncate | None = None,
    ) -> NDArray[np.float32]:
        """Return float32 vectors of shape (texts, dimensions), in order; of shape (dimensions,) for one `str`.

        `dimensions` cuts vectors where the model allows it; `normalize` None is the model's own way; `input_type`
        chooses a prompt (query, document, or a prompt's own name); `truncate` says what becomes of texts that are
        too long: END (the default), START, or NONE, which raises.

        Raises: RequestError, InferenceError; ModelNotReadyError where it is not loaded.
        """
        options = EmbedOptions(
            dimensions=dimensions, normalize=normalize, input_type=input_type, truncate=truncate
        )
        running = self._loaded()
        return running.call(running.embed(texts, options))

    async def aembed(
        self,
        texts: str | Sequence[str],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        input_type: str | None = None,
        truncate: Truncate | None = None,
    ) -> NDArray[np.float32]:
        """Do what `embed` does, without holding up the event loop. Cancelling it takes its work out of the queue."""
        options = EmbedOptions(
            dimensions=dimensions, normalize=normalize, input_type=input_type, truncate=truncate
        )
        running = self._loaded()
        return await asyncio.wrap_future(running.start(running.embed(texts, options)))

    def _loaded(self) -> _Running:
        if self._running is None:
            raise ModelNotReadyError(
                f"The model {self.spec.alias} is not loaded: use `with Embedder(...)`, or call load().",
                retry_after_s=1.0,
            )
        return self._running


def _close_elsewhere(running: _Running) -> None:
    threading.Thread(target=running.close, name="embedder-close", daemon=True).start()


class _Running:
    """A registry of one model, on an event loop with a thread of its own."""

    def __init__(self, spec: ModelSpec, settings: Settings) -> None:
        self._alias = spec.alias
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"embedder-{spec.alias}", daemon=True)
        self._thread.start()
        # A program may ask for as much as it likes, and wait for it as long as that takes.
        self._registry = Registry(
            ServedModels(specs=(spec,), preload=(spec.alias,)),
            ModelManager(settings),
            RegistryConfig(
                batching=settings.batching.model_copy(update={"max_queue_tokens": _NO_LIMIT}),
                limits=settings.limits.model_copy(
                    update={"request_timeout_s": _FOREVER_S, "max_request_tokens": _NO_LIMIT}
                ),
                memory=settings.memory.model_copy(update={"load_wait_s": _FOREVER_S}),
            ),
        )
        self._taking = True
        self._gate = threading.Lock()

    @property
    def description(self) -> ModelDescription:
        description = self._registry.status(self._alias).description
        if description is None:
            raise ModelNotReadyError(f"The model {self._alias} is being loaded anew.", retry_after_s=1.0)
        return description

    async def load(self) -> None:
        await self._registry.load(self._alias)

    async def embed(self, texts: str | Sequence[str], options: EmbedOptions) -> NDArray[np.float32]:
        listed = [texts] if isinstance(texts, str) else list(texts)
        for index, text in enumerate(listed):
            if not isinstance(text, str):
                raise TypeError(f"texts[{index}] is {type(text).__name__}, not str")
        async with self._registry.lease(self._alias) as engine:
            if not listed:
                return np.empty((0, options.dimensions or engine.description.dimension), dtype=np.float32)
            chunks = [listed[first : first + _CHUNK] for first in range(0, len(listed), _CHUNK)]
            vectors = [await engine.embed(chunks[0], options)]
            for first in range(1, len(chunks), 2):
                # Two at a time: one is tokenized while the other is embedded.
                pair = chunks[first : first + 2]
                vectors += await asyncio.gather(*(engine.embed(chunk, options) for chunk in pair))
        found = np.concatenate([part.vectors for part in vectors])
        return found[0] if isinstance(texts, str) else found

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run it on the loop. Raises: ModelNotReadyError where it is closed, or being closed."""
        with self._gate:
            if self._taking:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise ModelNotReadyError(f"The model {self._alias} was closed: call load() again.", retry_after_s=1.0)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it on the loop and wait; Ctrl-C ends it there too."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Finish what was started, then end the loop and its thread."""
        with self._gate:
            if not self._taking:
                return
            self._taking = False
            ended = asyncio.run_coroutine_threadsafe(self._registry.stop(), self._loop)
        ended.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()
            # Leaving cancels what is still waiting for an answer, so that nobody waits for it forever.
