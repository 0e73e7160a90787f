"""One served model: texts or token ids in, finished vectors out."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.errors import (
    DeadlineExceededError,
    LoadError,
    RequestError,
    TokenInputError,
    TooManyTokensError,
)
from emb_model_provider.serving.batcher import BatchPolicy
from emb_model_provider.serving.jobs import EmbeddingJob, Timing
from emb_model_provider.serving.memory_tuning import freeze_gc
from emb_model_provider.serving.model_thread import ModelThread
from emb_model_provider.serving.openai_tokens import decode_cl100k, load_cl100k
from emb_model_provider.serving.request_options import check_dimensions, choose_prompt, postprocess
from emb_model_provider.serving.scheduler import BatchScheduler, Timings
from emb_model_provider.settings import BatchSettings, LimitSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import Backend, ModelDescription
    from emb_model_provider.backends.tokenization import EncodedInputs
    from emb_model_provider.model_spec import ModelSpec, Truncate
    from emb_model_provider.serving.jobs import BatchRecord
    from emb_model_provider.serving.model_thread import StateChange

_INLINE_CHARACTERS = 2_000
"""Tokenizing this much takes about as long as handing it to another thread."""
_CPU_BATCH_TOKENS, _GPU_BATCH_TOKENS = 512, 131_072
"""On a CPU larger batches answer next to no more: 8 texts of 92 tokens at a time 172 a second, 32 of them 165. But all
of a batch wait for its end, and whoever comes next waits for that too."""
_CPU_FREE_TOKENS, _GPU_FREE_TOKENS = 256, 2_048
_WARM_UP_TEXT = "Is anybody there?"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Configuration that the engines of a service share."""

    executor: Executor
    """Tokenizes long inputs off the event loop."""
    batching: BatchSettings = field(default_factory=BatchSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    watchdog_s: float = 60.0
    """A batch that runs longer counts as hung, in seconds."""
    on_batch: Callable[[BatchRecord], None] = lambda _: None
    """Called on the model's thread after each batch."""
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedOptions:
    """What a request may say beside its inputs; None leaves it to the model."""

    dimensions: int | None = None
    normalize: bool | None = None
    input_type: str | None = None
    truncate: Truncate | None = None
    truncate_prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A request's answer."""

    vectors: NDArray[np.float32]
    """float32 of shape (inputs, dimensions), in the order of the inputs."""
    tokens: int
    """Tokens that were processed, after truncation, special tokens included."""
    truncated: int
    """How many inputs were cut."""
    tokenize_s: float
    timing: Timing


class Engine:
    """A loaded model that answers requests. Made by `start`, used on one event loop."""

    def __init__(
        self,
        spec: ModelSpec,
        config: EngineConfig,
        description: ModelDescription,
        core: _Core,
        memory_bytes: int,
    ) -> None:
        self.spec = spec
        self.description = description
        self.memory_bytes = memory_bytes
        """Memory that the model takes, as reported by its backend."""
        self._config = config
        self._tokenization, self._scheduler, self._thread = core

    @classmethod
    async def start(
        cls,
        spec: ModelSpec,
        load: Callable[[], Backend],
        config: EngineConfig,
        on_change: Callable[[StateChange, str], None] = lambda _change, _reason: None,
    ) -> Engine:
        """Load a model on a thread of its own, and run it once to check that it works.

        If the call is cancelled, the thread frees the model as soon as it is loaded.

        Args:
            spec: The model.
            load: Loads the backend. Called again if the model has crashed.
            config: Configuration of the engine.
            on_change: Called on the model's thread when the model crashes, recovers or fails, with the reason.

        Raises:
            LoadError: `token_input` needs a package that is not installed, or the model returns no finite vector.
            Exception: Whatever `load` raises.
        """
        if spec.token_input == "cl100k":
            await asyncio.get_running_loop().run_in_executor(config.executor, load_cl100k)
        loader = _BackendLoader(load)
        scheduler = BatchScheduler(
            spec.alias,
            check=loader.check,
            max_queue_tokens=config.batching.max_queue_tokens,
            watchdog_s=config.watchdog_s,
            on_batch=config.on_batch,
            timings=config.timings,
        )
        thread = ModelThread(
            spec.alias,
            scheduler,
            load=loader.load,
            policy_for=lambda description: batch_policy(config.batching, description.device),
            on_change=on_change,
            timings=config.timings,
        )
        try:
            description = await asyncio.wrap_future(thread.start())
        except asyncio.CancelledError:
            thread.request_stop()
            raise
        if loader.tokenization is None:
            raise AssertionError("a model that was loaded has a tokenizer")
        core = _Core(loader.tokenization, scheduler, thread)
        return cls(spec, config, description, core, loader.memory_bytes)

    @property
    def waiting_inputs(self) -> int:
        return self._scheduler.waiting_inputs

    @property
    def waiting_tokens(self) -> int:
        return self._scheduler.waiting_tokens

    @property
    def hang_report(self) -> str:
        """What hangs, for people; empty where nothing does."""
        return self._scheduler.hang_report

    def stop(self, timeout_s: float | None = None) -> bool:
        """Finish what was accepted, then free the model. Blocks; returns False where `timeout_s` was not enough."""
        return self._thread.stop(timeout_s)

    async def embed(
        self, inputs: Sequence[str] | Sequence[Sequence[int]], options: EmbedOptions
    ) -> Embeddings:
        """Return a vector for each input: a text, or a row of token ids.

        Cancelling the call takes its work out of the queue.

        Raises: RequestError where the request is at fault, QueueFullError, ModelNotReadyError,
        DeadlineExceededError, InferenceError.
        """
        dimensions = check_dimensions(options.dimensions, self.description, self.spec)
        prompt = choose_prompt(options.input_type, self.description.prompts, self.description.default_prompt)
        try:
            async with asyncio.timeout(self._config.limits.request_timeout_s):
                started = time.perf_counter()
                encoded = await self._encode(inputs, prompt, options)
                tokenize_s = time.perf_counter() - started
                tokens = sum(map(len, encoded.ids))
                if tokens > self._config.limits.max_request_tokens:
                    raise TooManyTokensError(tokens, self._config.limits.max_request_tokens)
                vectors, timing = await self._run(encoded)
        except TimeoutError:
            raise DeadlineExceededError(
                f"The request was not answered within {self._config.limits.request_timeout_s:g} seconds."
            ) from None
        normalize = self.description.normalize if options.normalize is None else options.normalize
        return Embeddings(
            vectors=postprocess(vectors, dimensions=dimensions, normalize=normalize),
            tokens=tokens,
            truncated=encoded.truncated,
            tokenize_s=tokenize_s,
            timing=timing,
        )

    async def _run(self, encoded: EncodedInputs) -> tuple[NDArray[np.float32], Timing]:
        job = EmbeddingJob(
            encoded.ids, prompt_lengths=encoded.prompt_lengths, dimension=self.description.dimension
        )
        self._scheduler.submit(job)
        try:
            return await job.result
        finally:
            if not job.result.done() or job.result.cancelled():
                self._scheduler.cancel(job)

    async def _encode(
        self, inputs: Sequence[str] | Sequence[Sequence[int]], prompt: str, options: EmbedOptions
    ) -> EncodedInputs:
        limit = self._limit(options.truncate_prompt_tokens)
        truncate = options.truncate or self.spec.truncate
        if limit < self.description.max_length and options.truncate is None:
            # Who names a limit wants it kept, whatever the model's own way is.
            truncate = "END"
        if isinstance(inputs[0], str):
            texts: Sequence[str] = inputs  # type: ignore[assignment]  # the API lets no mixture through
            if sum(map(len, texts)) <= _INLINE_CHARACTERS:
                return self._tokenization.encode(texts, prompt=prompt, truncate=truncate, max_tokens=limit)
            return await self._in_executor(
                lambda: self._tokenization.encode(texts, prompt=prompt, truncate=truncate, max_tokens=limit)
            )
        rows: Sequence[Sequence[int]] = inputs  # type: ignore[assignment]  # likewise
        if self.spec.token_input == "model":
            return self._tokenization.encode_token_ids(rows, truncate=truncate, max_tokens=limit)
        if self.spec.token_input == "cl100k":
            return await self._in_executor(
                lambda: self._tokenization.encode(
                    decode_cl100k(rows), prompt=prompt, truncate=truncate, max_tokens=limit
                )
            )
        raise TokenInputError(
            f"The model `{self.spec.alias}` is not set up to read token ids: send text (in LangChain, "
            "OpenAIEmbeddings(check_embedding_ctx_length=False)), or let the operator set its token_input in "
            "EMB_PROVIDER_MODEL_MAPPING to 'cl100k' for OpenAI's token ids or 'model' for the model's own."
        )

    async def _in_executor(self, encode: Callable[[], EncodedInputs]) -> EncodedInputs:
        return await asyncio.get_running_loop().run_in_executor(self._config.executor, encode)

    def _limit(self, requested: int | None) -> int:
        longest = self.description.max_length
        if requested is None or requested == -1:
            return longest
        if not 1 <= requested <= longest:
            raise RequestError(
                f"Invalid value for 'truncate_prompt_tokens' = {requested}. Supported values: [-1, 1 to {longest}].",
                param="truncate_prompt_tokens",
            )
        return requested


class _BackendLoader:
    """Loads the backend of one model, once or again after a crash, and checks it. Used on the model's thread."""

    def __init__(self, load: Callable[[], Backend]) -> None:
        self._load = load
        self.tokenization: Tokenization | None = None
        self.memory_bytes = 0
        self._tokenizer_json = ""

    def load(self) -> Backend:
        backend = self._load()
        try:
            self._tokenize_for(backend.description)
            self.check(backend)
            self.memory_bytes = backend.memory_bytes
        except BaseException:
            backend.close()
            raise
        freeze_gc()
        return backend

    def _tokenize_for(self, description: ModelDescription) -> None:
        if self.tokenization is None:
            self.tokenization = Tokenization(description)
            self._tokenizer_json = description.tokenizer_json
        if description.tokenizer_json != self._tokenizer_json:
            # Waiting requests were tokenized for the model that was here before.
            raise LoadError("it was reloaded, and its files are those of another model now")

    def check(self, backend: Backend) -> None:
        """Run the model once on a short text.

        Raises:
            LoadError: It returns no vector, or one that is not finite.
        """
        if self.tokenization is not None:
            _warm_up(backend, self.tokenization)


class _Core(NamedTuple):
    """The parts of a started engine."""

    tokenization: Tokenization
    scheduler: BatchScheduler
    thread: ModelThread


def _warm_up(backend: Backend, tokenization: Tokenization) -> None:
    """Run the model once on a short text, on its own thread.

    Raises: LoadError where it gives no vector, or one that is not finite.
    """
    encoded = tokenization.encode([_WARM_UP_TEXT], truncate="END")
    try:
        vectors = backend.embed(TokenBatch(ids=encoded.ids, prompt_lengths=encoded.prompt_lengths))
    except Exception as error:
        raise LoadError(f"it cannot embed the plainest of texts: {type(error).__name__}: {error}") from error
    if not np.isfinite(vectors).all():
        raise LoadError(
            "its vector of the plainest of texts is not finite: its weights are damaged, or its precision is too low."
        )


def batch_policy(settings: BatchSettings, device: str) -> BatchPolicy:
    """Return the batch policy for a device; what the operator set wins."""
    on_cpu = device == "cpu"
    return BatchPolicy(
        max_batch_size=settings.max_batch_size,
        max_batch_tokens=settings.max_batch_tokens or (_CPU_BATCH_TOKENS if on_cpu else _GPU_BATCH_TOKENS),
        min_batch_size=settings.min_batch_size,
        max_wait_s=settings.max_wait_time_ms / 1000,
        dynamic=settings.enable_dynamic_batching,
        free_padded_tokens=_CPU_FREE_TOKENS if on_cpu else _GPU_FREE_TOKENS,
    )
