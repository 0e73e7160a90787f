"""Runs a model in a Python program, without a server: the engine of the service behind plain calls."""

from __future__ import annotations

import asyncio
import threading
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from emb_model_provider.concurrency import ForkGuard
from emb_model_provider.errors import InputTooLongError, ModelNotReadyError
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.model_resolver import resolve_model
from emb_model_provider.registry import Registry, RegistryConfig
from emb_model_provider.serving.engine import EmbedOptions, ScoreOptions
from emb_model_provider.serving.request_options import choose_prompt
from emb_model_provider.serving.result_cache import ResultCache
from emb_model_provider.serving.results import RankedDocument
from emb_model_provider.settings import ServedModels
from emb_model_provider.settings.loading import load_settings

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import ModelDescription, SparseVector
    from emb_model_provider.model_spec import BackendName, ModelSpec, Precision, Source, Truncate
    from emb_model_provider.serving.results import Embeddings
    from emb_model_provider.settings import Settings

T = TypeVar("T")

_CHUNK_SIZE = 1024
"""Texts that are tokenized at once. Tokenizing a whole corpus at once would take several times its memory."""
_NO_LIMIT = 2**62
_NO_TIMEOUT_S = 1e9


class Embedder:
    """A model that is loaded in this process.

        with Embedder("damo/nlp_gte_sentence-embedding_chinese-base", precision="bf16") as embedder:
            vectors = embedder.embed(["你好", "hello"])

    The model is downloaded and compiled if necessary, as by the service: with the same settings (EMB_PROVIDER_...
    variables and .env) and the same caches. In a program with an event loop, use `async with` and `aembed`.
    Thread-safe: the texts of concurrent calls share batches.
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
        """Choose the model, without loading it. Arguments take precedence over the settings.

        Args:
            model: An alias of the settings, the id of a repository, or a directory. None: the first model of the
                settings.
            source: Hub of the model: `auto`, `huggingface`, `modelscope`, `local` or `bundled`.
            revision: Branch, tag or commit of the repository.
            precision: `auto`, `fp32`, `fp16`, `bf16`, `int8` or `int4`.
            device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
            backend: `auto`, `openvino` or `torch`.
            settings: All settings. None: they are read from the environment and .env.

        Raises:
            SettingsError: A setting is invalid, or contradicts an argument.
        """
        self._settings = settings if settings is not None else load_settings()[0]
        name = model if model is not None else self._settings.models.specs()[0].alias
        spec = resolve_model(self._settings, name, source=source, revision=revision, precision=precision)
        self._defaults = spec.defaults_of(name)
        self.spec: ModelSpec = replace(spec, device=device or spec.device, backend=backend or spec.backend)
        self._running: _Running | None = None
        self._starting = threading.Lock()
        self._guard: ForkGuard | None = None
        """Of the process that has loaded the model."""

    # --- loading and closing --------------------------------------------------------------------------

    def load(self) -> Self:
        """Download, compile and load the model as far as necessary. Does nothing if it is loaded. Blocks.

        Returns:
            This object.

        Raises:
            HubError: The model cannot be downloaded.
            LoadError: The model cannot be compiled or loaded.
            ForkedProcessError: A model was loaded before this process was forked.
        """
        self._check_process()
        with self._starting:
            if self._running is None:
                self._guard = ForkGuard(f"The model {self.spec.alias} was loaded")
                running = _Running(self.spec, self._settings)
                try:
                    running.call(running.registry.load(self.spec.alias))
                except BaseException:
                    running.close()
                    raise
                self._running = running
                # For programs that drop the object without closing it. On a thread, because garbage can be collected on
                # the thread that closing waits for. Not at exit, because no thread can be started then.
                closing = threading.Thread(target=running.close, name="embedder-close", daemon=True)
                weakref.finalize(self, closing.start).atexit = False
        return self

    def close(self) -> None:
        """Finish the calls in progress, then free the model. Does nothing if it is not loaded.

        `load` loads the model again. In a process that was forked after `load`, there is nothing to free.
        """
        if self._guard is not None and self._guard.is_other_process:
            return
        with self._starting:
            running, self._running = self._running, None
        if running is not None:
            running.close()

    def __enter__(self) -> Self:
        return self.load()

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.load)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    # --- embedding ------------------------------------------------------------------------------------

    @property
    def description(self) -> ModelDescription:
        """The properties of the loaded model: dimension, max_length, precision, fidelity and others.

        Raises:
            ModelNotReadyError: The model is not loaded, or is being restarted.
        """
        alias = self.spec.alias
        description = self._loaded().registry.status(alias).description
        if description is None:
            raise ModelNotReadyError(f"The model {alias} is being restarted. Try again later.", retry_after_s=1.0)
        return description

    @property
    def digest(self) -> str:
        """The sha256 of the files of the loaded model, by which another version of the same model is recognized.

        Raises:
            ModelNotReadyError: The model is not loaded.
        """
        snapshot = self._loaded().registry.status(self.spec.alias).snapshot
        assert snapshot is not None  # noqa: S101 - a loaded model has one
        return snapshot.digest

    def prompt(self, input_type: str | None = None) -> str:
        """Return the text that is put before each text; empty for none. `input_type` and errors are those of `embed`."""
        return choose_prompt(self._defaults.input_type if input_type is None else input_type, self.description)

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        input_type: str | None = None,
        truncate: Truncate | None = None,
    ) -> NDArray[np.float32]:
        """Return the vectors of texts. Blocks. There is no limit to the number of texts.

        Args:
            texts: Texts, or one text.
            dimensions: Size to which vectors are truncated, if the model supports it. Truncated vectors are normalized.
                None: the size of the model's vectors.
            normalize: Whether vectors are scaled to length 1. None: as the model declares.
            input_type: Prompt to put before each text: its name, or `query` or `document`. None: that of the alias in the
                settings, or the model's default.
            truncate: Side from which texts that are too long are cut: `END` or `START`; `NONE` raises RequestError
                instead. None: as in the settings, `END` by default.

        Returns:
            float32 of shape (texts, dimensions), in the order of the texts; of shape (dimensions,) for one text.

        Raises:
            RequestError: An argument is not supported by the model, or a text is too long.
            TypeError: A text is not a `str`.
            InferenceError: The model failed on a text.
            ModelNotReadyError: The model is not loaded, was closed, or crashed repeatedly.
            ForkedProcessError: The model was loaded before this process was forked.
        """
        options = self._options(dimensions, normalize, input_type, truncate)
        running = self._loaded()
        return running.call(running.embed_dense(texts, options))

    async def aembed(
        self,
        texts: str | Sequence[str],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        input_type: str | None = None,
        truncate: Truncate | None = None,
    ) -> NDArray[np.float32]:
        """Return the vectors of texts without blocking the event loop.

        Arguments, result and errors are those of `embed`. Cancelling the call removes its texts from the queue.
        """
        options = self._options(dimensions, normalize, input_type, truncate)
        running = self._loaded()
        return await asyncio.wrap_future(running.start(running.embed_dense(texts, options)))

    def submit(
        self,
        texts: Sequence[str],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        input_type: str | None = None,
        truncate: Truncate | None = None,
    ) -> Future[Embeddings]:
        """Queue at least one text, and return a future of the vectors with their measurements, such as the tokens.

        All texts are tokenized at once, so pass at most some thousands. With several futures, the model computes while the
        program reads texts and writes vectors. Arguments and errors, which the future raises, are those of `embed`.
        Cancelling the future removes its texts from the queue.
        """
        options = self._options(dimensions, normalize, input_type, truncate)
        running = self._loaded()
        return running.start(running.embed_at_once(texts, options))

    def embed_sparse(
        self, texts: Sequence[str], *, input_type: str | None = None, top_k: int | None = None
    ) -> list[SparseVector]:
        """Return the sparse vectors of texts, in their order. Blocks.

        Args:
            texts: Texts.
            input_type: `query` or `document`, for a model that distinguishes them; see `embed`.
            top_k: Number of the largest weights of each text that are returned. None: all.

        Returns:
            For each text `indices`, int32 of shape (terms,) in ascending order, which are token ids, and `values`, float32
            of shape (terms,), which are greater than 0.

        Raises:
            UnsupportedTaskError: The model has no sparse vectors. Other errors are those of `embed`.
        """
        options = replace(self._options(None, None, input_type, None), outputs=("sparse",), top_k=top_k)
        running = self._loaded()
        return [vector for part in running.call(running.embed(texts, options)) for vector in part.sparse or ()]

    def embed_multi_vector(self, texts: Sequence[str], *, input_type: str | None = None) -> list[NDArray[np.float32]]:
        """Return the vectors of the tokens of texts, in their order. Blocks.

        Args:
            texts: Texts.
            input_type: `query` or `document`; see `embed`. The queries of most models have other tokens.

        Returns:
            For each text float32 of shape (tokens, dimension).

        Raises:
            UnsupportedTaskError: The model has no vectors of tokens. Other errors are those of `embed`.
        """
        options = replace(self._options(None, None, input_type, None), outputs=("multi_vector",))
        running = self._loaded()
        return [vectors for part in running.call(running.embed(texts, options)) for vectors in part.multi_vector or ()]

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        raw: bool | None = None,
        instruction: str | None = None,
    ) -> list[RankedDocument]:
        """Return the documents by their scores for a query, the best first. Blocks.

        Args:
            query: The query.
            documents: The documents, any number of them. One that does not fit next to the query gets the best score of
                its parts or, with `long_documents` of the model set to `cut`, that of its beginning.
            top_n: Number of documents that are returned. None: all.
            raw: Whether scores are logits. None: as in the settings, by default the activation of the model is applied,
                most often a sigmoid.
            instruction: What the documents are searched for, if the model has instructions.

        Returns:
            min(top_n, documents) documents with the highest scores, each with its `index` among `documents`, its `score`
            as a Python float, from 0 to 1 after a sigmoid, and its text as `document`. Documents with equal scores keep
            their order. Empty if there are no documents.

        Raises:
            UnsupportedTaskError: The model is not a reranker.
            RequestError: The query leaves no room for a document.
            TypeError: The query or a document is not a `str`.
            InferenceError: The model failed on a pair.
            ModelNotReadyError: The model is not loaded, was closed, or crashed repeatedly.
            ForkedProcessError: The model was loaded before this process was forked.
        """
        running = self._loaded()
        options = ScoreOptions(raw=raw, instruction=instruction).with_defaults(self._defaults)
        scores = running.call(running.score(query, documents, options))
        order = sorted(range(len(documents)), key=lambda index: -scores[index])
        return [RankedDocument(index, scores[index], documents[index]) for index in order[:top_n]]

    def _options(
        self, dimensions: int | None, normalize: bool | None, input_type: str | None, truncate: Truncate | None
    ) -> EmbedOptions:
        return EmbedOptions(
            dimensions=dimensions,
            normalize=normalize,
            input_type=self._defaults.input_type if input_type is None else input_type,
            truncate=truncate,
        )

    def _check_process(self) -> None:
        if self._guard is not None:
            self._guard.check()

    def _loaded(self) -> _Running:
        self._check_process()
        if self._running is None:
            raise ModelNotReadyError(
                f"The model {self.spec.alias} is not loaded. Use `with Embedder(...)`, or call load().",
                retry_after_s=1.0,
            )
        return self._running


class _Running:
    """A registry of one model, and an event loop with its own thread."""

    def __init__(self, spec: ModelSpec, settings: Settings) -> None:
        self._alias = spec.alias
        # Without the limits of the service, because a program decides itself how much it embeds.
        self.registry = Registry(
            ServedModels(specs=(spec,), preload=(spec.alias,)),
            ModelManager(settings),
            RegistryConfig(
                batching=settings.batching.model_copy(update={"max_queue_tokens": _NO_LIMIT}),
                limits=settings.limits.model_copy(
                    update={
                        "request_timeout_s": _NO_TIMEOUT_S,
                        "request_total_timeout_s": _NO_TIMEOUT_S,
                        "max_request_tokens": _NO_LIMIT,
                    }
                ),
                memory=settings.memory.model_copy(update={"load_wait_s": _NO_TIMEOUT_S}),
                result_cache=ResultCache(settings.memory.result_cache_bytes),
            ),
        )
        self._is_open = True
        self._open_lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"embedder-{spec.alias}", daemon=True)
        self._thread.start()

    async def embed_dense(self, texts: str | Sequence[str], options: EmbedOptions) -> NDArray[np.float32]:
        parts = await self.embed([texts] if isinstance(texts, str) else texts, options)
        if not parts:
            dimension = self.registry.status(self._alias).description
            width = options.dimensions or (dimension.dimension if dimension is not None else 0)
            return np.empty((0, width), dtype=np.float32)
        vectors = np.concatenate([part.vectors for part in parts])
        return vectors[0] if isinstance(texts, str) else vectors

    async def embed(self, texts: Sequence[str], options: EmbedOptions) -> list[Embeddings]:
        """Return the embeddings of texts, in parts of `_CHUNK_SIZE`."""
        inputs = _checked(texts, "texts")
        async with self.registry.lease(self._alias) as engine:

            async def embed_chunk(start: int) -> Embeddings:
                try:
                    return await engine.embed(inputs[start : start + _CHUNK_SIZE], options)
                except InputTooLongError as error:
                    raise InputTooLongError(start + error.index, error.max_length) from None

            starts = range(0, len(inputs), _CHUNK_SIZE)
            chunks = [await embed_chunk(0)] if inputs else []
            for index in range(1, len(starts), 2):
                # Two at a time, so that one is tokenized while the other is embedded.
                chunks += await asyncio.gather(*map(embed_chunk, starts[index : index + 2]))
        return chunks

    async def embed_at_once(self, texts: Sequence[str], options: EmbedOptions) -> Embeddings:
        async with self.registry.lease(self._alias) as engine:
            return await engine.embed(_checked(texts, "texts"), options)

    async def score(self, query: str, documents: Sequence[str], options: ScoreOptions) -> list[float]:
        """Return the score of each document."""
        _checked([query], "query")
        pairs = [(query, document) for document in _checked(documents, "documents")]
        scores: list[float] = []
        async with self.registry.lease(self._alias) as engine:
            for start in range(0, len(pairs), _CHUNK_SIZE):
                result = await engine.score_pairs(pairs[start : start + _CHUNK_SIZE], options)
                scores += result.scores.tolist()
        return scores

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine on the loop. Raises ModelNotReadyError after `close`."""
        with self._open_lock:
            if self._is_open:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise ModelNotReadyError(f"The model {self._alias} is closed. Call load() again.", retry_after_s=1.0)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop, and cancel it if waiting for it is interrupted, such as by Ctrl-C."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Finish the coroutines in progress, then end the loop and its thread."""
        with self._open_lock:
            if not self._is_open:
                return
            self._is_open = False
            stopped = asyncio.run_coroutine_threadsafe(self.registry.stop(), self._loop)
        stopped.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()
            # Leaving the block cancels the remaining tasks, so that no caller waits for them forever.


def _checked(texts: Sequence[str], name: str) -> list[str]:
    """Return texts as a list; TypeError if one is not a `str`."""
    inputs = list(texts)
    for index, text in enumerate(inputs):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{index}] must be a str, not {type(text).__name__}")
    return inputs
