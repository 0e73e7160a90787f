"""One served model: texts or token ids in, finished vectors out."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
from emb_model_provider.serving.memory_tuning import spare_what_stays
from emb_model_provider.serving.model_thread import Worker
from emb_model_provider.serving.openai_tokens import decode_cl100k, load_cl100k
from emb_model_provider.serving.request_options import check_dimensions, choose_prompt, finished
from emb_model_provider.serving.scheduler import Lanes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import Backend, ModelDescription
    from emb_model_provider.backends.tokenization import EncodedInputs
    from emb_model_provider.model_spec import ModelSpec, Truncate
    from emb_model_provider.serving.jobs import BatchRecord
    from emb_model_provider.serving.model_thread import Change
    from emb_model_provider.settings import BatchSettings, LimitSettings

_INLINE_CHARACTERS = 2_000
"""Tokenizing this much takes about as long as handing it to another thread."""
_CPU_BATCH_TOKENS, _GPU_BATCH_TOKENS = 512, 131_072
"""On a CPU larger batches answer next to no more: 8 texts of 92 tokens at a time 172 a second, 32 of them 165. But all
of a batch wait for its end, and whoever comes next waits for that too."""
_CPU_FREE_TOKENS, _GPU_FREE_TOKENS = 256, 2_048
_FIRST_TEXT = "Is anybody there?"


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
        description: ModelDescription,
        tokenization: Tokenization,
        lanes: Lanes,
        worker: Worker,
        limits: LimitSettings,
        executor: Executor,
        memory_bytes: int,
    ) -> None:
        self.spec = spec
        self.description = description
        self.memory_bytes = memory_bytes
        """What the model takes in memory, as its backend says."""
        self._tokenization = tokenization
        self._lanes = lanes
        self._worker = worker
        self._limits = limits
        self._executor = executor

    @classmethod
    async def start(
        cls,
        spec: ModelSpec,
        load: Callable[[], Backend],
        *,
        batching: BatchSettings,
        limits: LimitSettings,
        executor: Executor,
        on_batch: Callable[[BatchRecord], None],
        watchdog_s: float = 60.0,
        on_change: Callable[[Change, str], None] = lambda _change, _reason: None,
    ) -> Engine:
        """Load the model on a thread of its own, and run it once to see that it answers.

        `load` is called again where the model breaks down and is loaded anew; `on_change` is told of that, on the
        model's thread. Where the call is cancelled, the thread frees the model as soon as it is loaded.

        Raises: whatever `load` raises, and LoadError where token_input needs something that is not here or
        the model gives no vector.
        """
        if spec.token_input == "cl100k":
            await asyncio.get_running_loop().run_in_executor(executor, load_cl100k)
        tokenization: Tokenization | None = None
        tokenizer_json = ""
        memory_bytes = 0

        def check(backend: Backend) -> None:
            if tokenization is not None:
                _try(backend, tokenization)

        def load_and_try() -> Backend:
            nonlocal tokenization, tokenizer_json, memory_bytes
            backend = load()
            try:
                if tokenization is None:
                    tokenizer_json = backend.description.tokenizer_json
                    tokenization = Tokenization(backend.description)
                _require_same(tokenizer_json, backend.description.tokenizer_json)
                _try(backend, tokenization)
                memory_bytes = backend.memory_bytes
            except BaseException:
                backend.close()
                raise
            spare_what_stays()
            return backend

        lanes = Lanes(
            spec.alias,
            check=check,
            max_queue_tokens=batching.max_queue_tokens,
            watchdog_s=watchdog_s,
            on_batch=on_batch,
        )
        worker = Worker(
            spec.alias,
            lanes,
            load=load_and_try,
            policy_for=lambda description: batch_policy(batching, description.device),
            on_change=on_change,
        )
        try:
            description = await asyncio.wrap_future(worker.start())
        except asyncio.CancelledError:
            worker.leave()
            raise
        if tokenization is None:
            raise RuntimeError("a loaded model has a tokenizer")
        return cls(spec, description, tokenization, lanes, worker, limits, executor, memory_bytes)

    @property
    def waiting_inputs(self) -> int:
        return self._lanes.waiting_inputs

    @property
    def waiting_tokens(self) -> int:
        return self._lanes.waiting_tokens

    @property
    def hung(self) -> str:
        """What hangs, for people; empty where nothing does."""
        return self._lanes.hung

    def stop(self, timeout_s: float | None = None) -> bool:
        """Finish what was accepted, then free the model. Blocks; returns False where `timeout_s` was not enough."""
        return self._worker.stop(timeout_s)

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
            async with asyncio.timeout(self._limits.request_timeout_s):
                started = time.perf_counter()
                encoded = await self._encode(inputs, prompt, options)
                tokenize_s = time.perf_counter() - started
                tokens = sum(map(len, encoded.ids))
                if tokens > self._limits.max_request_tokens:
                    raise TooManyTokensError(tokens, self._limits.max_request_tokens)
                vectors, timing = await self._run(encoded)
        except TimeoutError:
            raise DeadlineExceededError(
                f"The request was not answered within {self._limits.request_timeout_s:g} seconds."
            ) from None
        normalize = self.description.normalize if options.normalize is None else options.normalize
        return Embeddings(
            vectors=finished(vectors, dimensions=dimensions, normalize=normalize),
            tokens=tokens,
            truncated=encoded.truncated,
            tokenize_s=tokenize_s,
            timing=timing,
        )

    async def _run(self, encoded: EncodedInputs) -> tuple[NDArray[np.float32], Timing]:
        job = EmbeddingJob(
            encoded.ids, prompt_lengths=encoded.prompt_lengths, dimension=self.description.dimension
        )
        self._lanes.submit(job)
        try:
            return await job.result
        finally:
            if not job.result.done() or job.result.cancelled():
                self._lanes.cancel(job)

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
            return await self._elsewhere(
                lambda: self._tokenization.encode(texts, prompt=prompt, truncate=truncate, max_tokens=limit)
            )
        rows: Sequence[Sequence[int]] = inputs  # type: ignore[assignment]  # likewise
        if self.spec.token_input == "model":
            return self._tokenization.encode_token_ids(rows, truncate=truncate, max_tokens=limit)
        if self.spec.token_input == "cl100k":
            return await self._elsewhere(
                lambda: self._tokenization.encode(
                    decode_cl100k(rows), prompt=prompt, truncate=truncate, max_tokens=limit
                )
            )
        raise TokenInputError(
            f"The model `{self.spec.alias}` is not set up to read token ids: send text (in LangChain, "
            "OpenAIEmbeddings(check_embedding_ctx_length=False)), or let the operator set its token_input in "
            "EMB_PROVIDER_MODEL_MAPPING to 'cl100k' for OpenAI's token ids or 'model' for the model's own."
        )

    async def _elsewhere(self, encode: Callable[[], EncodedInputs]) -> EncodedInputs:
        return await asyncio.get_running_loop().run_in_executor(self._executor, encode)

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


def _require_same(before: str, now: str) -> None:
    """Raises: LoadError where requests were tokenized for another model than the one that is here now."""
    if now != before:
        raise LoadError("it was loaded anew, and is another model now")


def _try(backend: Backend, tokenization: Tokenization) -> None:
    """Run the model once on a short text, on its own thread.

    Raises: LoadError where it gives no vector, or one that is not finite.
    """
    encoded = tokenization.encode([_FIRST_TEXT], truncate="END")
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
        max_wait_s=settings.max_wait_s,
        dynamic=settings.dynamic,
        free_padded_tokens=_CPU_FREE_TOKENS if on_cpu else _GPU_FREE_TOKENS,
    )
