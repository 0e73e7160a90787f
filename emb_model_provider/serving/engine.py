"""A loaded model that answers requests: texts, token ids or pairs of texts in, vectors or scores out."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from emb_model_provider.backends.arrays import finite_rows
from emb_model_provider.backends.base import TASKS, Outputs, TokenBatch
from emb_model_provider.backends.output_types import range_of
from emb_model_provider.backends.pairs import PAIR_NAMES, PairTokenization
from emb_model_provider.backends.similarity import maxsim, sparse_dot
from emb_model_provider.backends.tokenization import EncodedInputs, Tokenization
from emb_model_provider.concurrency import ForkGuard
from emb_model_provider.errors import (
    DeadlineExceededError,
    InputTooLongError,
    LoadError,
    RequestError,
    TextTooLongError,
    TokenInputError,
    TooManyTokensError,
    UnsupportedTaskError,
)
from emb_model_provider.serving import cl100k
from emb_model_provider.serving.jobs import InferenceJob, StageRecord, Timing, is_background
from emb_model_provider.serving.memory_tuning import freeze_gc
from emb_model_provider.serving.model_thread import ModelThread
from emb_model_provider.serving.request_options import (
    activate,
    check_dimensions,
    choose_prompt,
    choose_task,
    postprocess,
)
from emb_model_provider.serving.results import Classifications, Embeddings, PairScores, Similarities
from emb_model_provider.serving.scheduler import BatchScheduler

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
    from concurrent.futures import Executor

    from emb_model_provider.backends.base import Activation, Backend, ModelDescription, OutputName, Row, Task
    from emb_model_provider.backends.pairs import EncodedPairs, PairNames
    from emb_model_provider.backends.tokenization import Token
    from emb_model_provider.model_spec import LongDocuments, ModelSpec, RequestDefaults, Truncate
    from emb_model_provider.serving.config import EngineConfig
    from emb_model_provider.serving.model_thread import StateChange
    from emb_model_provider.serving.result_cache import ModelResults, ResultCache

T = TypeVar("T")


_SPEED_FACTOR = 5
"""A request may take this many times the time that the model needs at its present speed, because later requests share it."""
_TOTAL_FACTOR = 10
"""A request may take at least this many times REQUEST_TIMEOUT_S while the model makes progress."""
_DECODED_FACTOR = 2
"""Times MAX_REQUEST_TOKENS that a request may have whose ids of OpenAI's tokenizer are within this limit. Its client fills requests
up to OpenAI's limit, and cannot know the number of tokens of the model, which can be larger."""
_INLINE_CHARACTERS = 2_000
"""Tokenizing this many characters takes about as long as passing them to another thread."""
_PART_CHARACTERS = 64 * 1024
"""Characters that are tokenized before other requests get a turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedOptions:
    """Options of a request. None selects the default of the model."""

    dimensions: int | None = None
    """Size to which vectors are truncated."""
    normalize: bool | None = None
    """Whether vectors are scaled to length 1. Truncated vectors always are."""
    input_type: str | None = None
    """Name of a prompt, or a synonym of `query` or `document`."""
    instruction: str | None = None
    """Text that replaces the instruction in the prompt of the model; see `choose_prompt`."""
    truncate: Truncate | Literal["AUTO"] | None = None
    """Side from which inputs that are too long are cut; NONE rejects them, and AUTO is the side that the tokenizer of the
    model declares."""
    truncate_prompt_tokens: int | None = None
    """Longest input in tokens, at most that of the model; -1 is that of the model."""
    outputs: tuple[OutputName, ...] = ("dense",)
    """One or several of `dense`, `sparse` and `multi_vector`, which are computed in one pass."""
    top_k: int | None = None
    """Number of the largest weights of a sparse vector that are returned. None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions:
    """Options of a request for scores of pairs or labels. None selects the default of the model."""

    raw: bool | None = None
    """Whether scores are logits, without the activation of the model."""
    instruction: str | None = None
    """Text before each query or, for a model with a chat template, the instruction in it."""
    long_documents: LongDocuments | Literal["reject"] | None = None
    """What happens to a document that does not fit next to the query."""
    max_document_tokens: int | None = None
    """Longest document in tokens; what is beyond it is not read."""
    names: PairNames = PAIR_NAMES
    """Names of the fields of the request with the queries and the documents, for errors."""

    def with_defaults(self, defaults: RequestDefaults) -> ScoreOptions:
        """Return the options, with those of an alias where the request has none."""
        return replace(
            self,
            raw=defaults.raw_scores if self.raw is None else self.raw,
            long_documents=self.long_documents or defaults.long_documents,
        )


class Engine:
    """A loaded model that answers requests. Used on one event loop."""

    def __init__(
        self,
        spec: ModelSpec,
        load: Callable[[], Backend],
        config: EngineConfig,
        executor: Executor,
        on_change: Callable[[StateChange, str], None],
    ) -> None:
        """Create an engine that answers requests after `start`.

        `load` and `on_change` are called on the thread of the model: `load` again after each crash, `on_change` with the
        state after a crash and its reason. The executor tokenizes long inputs, so that they do not block the event loop.
        """
        self.spec = spec
        self._guard = ForkGuard(f"The model {spec.alias} was created")
        self.description: ModelDescription
        self.memory_bytes: int
        self._tokenizations: Mapping[str | None, Tokenization]
        self._pairs: PairTokenization | None = None
        self._limits = config.limits
        self._executor = executor
        self._loader = _BackendLoader(load, config.result_cache)
        self._on_lookup = config.on_lookup
        self._on_stages = config.on_stages
        self._scheduler = BatchScheduler(spec.alias, config, self._loader.check)
        self._thread = ModelThread(spec.alias, self._scheduler, self._loader.load, config, on_change)

    async def start(self) -> None:
        """Load the model on its own thread, and embed a test text to check that it works.

        If the call is cancelled, the thread frees the model as soon as it is loaded. Any error of the load is raised.
        """
        if self.spec.token_input == "cl100k":
            await asyncio.get_running_loop().run_in_executor(self._executor, cl100k.load_vocabulary)
        try:
            self.description = await asyncio.wrap_future(self._thread.start())
        except asyncio.CancelledError:
            self._scheduler.stop()
            raise
        self._tokenizations, self.memory_bytes = self._loader.tokenizations, self._loader.memory_bytes
        if "scores" in self.description.outputs:
            self._pairs = PairTokenization(self._tokenizations[None], self.description)

    @property
    def waiting_inputs(self) -> int:
        return self._scheduler.waiting_inputs

    @property
    def waiting_tokens(self) -> int:
        return self._scheduler.waiting_tokens

    def count_requests(self) -> tuple[int, int]:
        """Return how many requests wait for their first batch, and how many have begun and are not answered."""
        return self._scheduler.count_requests()

    @property
    def hang_report(self) -> str:
        """A description of the batch that hangs, or an empty string."""
        return self._scheduler.hang_report

    def stop(self, timeout_s: float | None = None) -> bool:
        """Answer the accepted requests, then free the model; return False if that took longer. Blocks."""
        stopped = self._thread.stop(timeout_s)
        self._loader.results.close()
        return stopped

    async def embed(self, inputs: Sequence[str] | Sequence[Sequence[int]], options: EmbedOptions) -> Embeddings:
        """Return a vector for each input: at least one text or row of token ids, all of the same kind.

        Cancelling the call removes its inputs from the queue.

        Raises:
            RequestError: The request is invalid.
            QueueFullError: The queue is full.
            ModelNotReadyError: The model hangs, has failed, or is stopping.
            DeadlineExceededError: The model made no progress for REQUEST_TIMEOUT_S, or the request took longer than
                REQUEST_TOTAL_TIMEOUT_S.
            InferenceError: The model failed on an input.
            ForkedProcessError: The model was created before this process was forked.
        """
        self._require(options.outputs)
        dimensions = check_dimensions(options.dimensions, self.description, self.spec)
        task = choose_task(options.input_type, self.description)
        prompt = choose_prompt(options.input_type, self.description, options.instruction)
        request = self._begin()
        encoded = await self._encode(request, inputs, task, prompt, options)
        is_decoded = not isinstance(inputs[0], str) and self.spec.token_input != "model"
        rows, measured = await self._run(
            encoded, options.outputs, task, request, token_factor=_DECODED_FACTOR if is_decoded else 1
        )
        results = Outputs.of_rows(options.outputs, rows)
        described = self._described(task)
        vectors = np.empty((len(rows), 0), dtype=np.float32)
        value_range = None
        if results.dense is not None:
            normalize = described.normalize if options.normalize is None else options.normalize
            vectors = postprocess(results.dense, dimensions=dimensions, normalize=normalize)
            calibration, normalized = described.calibration, normalize or dimensions is not None
            value_range = range_of(calibration, vectors.shape[1], normalized=normalized) if calibration else None
        sparse = results.sparse
        if sparse is not None and options.top_k is not None:
            sparse = [vector.largest(options.top_k) for vector in sparse]
        return Embeddings(
            input_tokens=list(map(len, encoded.ids)),
            vectors=vectors,
            value_range=value_range,
            is_interim=described.is_interim,
            sparse=sparse,
            multi_vector=results.multi_vector,
            **measured,
        )

    async def similarity(self, source: str, others: Sequence[str], options: EmbedOptions) -> Similarities:
        """Return how similar a text is to each of several others; at least one.

        It is the cosine of dense vectors, or else MaxSim or the dot product of sparse vectors. For these, the text is
        embedded as a query, and the others as documents, unless the options have an `input_type`. Errors are those of
        `embed`.
        """
        outputs = self.description.outputs
        output = next((name for name in outputs if name in ("multi_vector", "sparse")), None)
        if output is None or "dense" in outputs:
            embeddings = await self.embed([source, *others], replace(options, normalize=True))
            vectors = embeddings.vectors
            parts, values = [embeddings], np.ascontiguousarray(vectors[1:] @ vectors[0])
        else:
            options = replace(options, outputs=(output,))
            query = await self.embed([source], replace(options, input_type=options.input_type or "query"))
            documents = await self.embed(others, replace(options, input_type=options.input_type or "document"))
            parts = [query, documents]
            values = np.array(_compare(query, documents), dtype=np.float32)
        return Similarities(
            values=values,
            tokens=sum(part.tokens for part in parts),
            truncated=sum(part.truncated for part in parts),
            tokenize_s=sum(part.tokenize_s for part in parts),
            timing=Timing(
                queue_s=sum(part.timing.queue_s for part in parts),
                inference_s=sum(part.timing.inference_s for part in parts),
            ),
        )

    async def score_pairs(self, pairs: Sequence[tuple[str, str]], options: ScoreOptions) -> PairScores:
        """Return the score of each pair of a query and a document; at least one pair.

        A document that does not fit next to its query gets the best score of its windows, or is cut. Cancelling the call
        removes its inputs from the queue. Errors are those of `embed`.
        """
        self._require(("scores",), task="rerank")
        tokenization = self._pairs
        assert tokenization is not None  # noqa: S101 - rerankers have one
        long = options.long_documents or self.spec.defaults.long_documents
        prompt = options.instruction or self._default_pair_prompt()
        request = self._begin()

        def encode() -> EncodedPairs:
            return tokenization.encode(
                pairs,
                prompt=prompt,
                long_documents=None if long == "reject" else long,
                max_document_tokens=options.max_document_tokens,
                names=options.names,
            )

        characters = sum(len(query) + len(document) for query, document in pairs)
        encoded = await self._in_thread(request, encode, characters)
        rows, measured = await self._run(encoded.inputs, ("scores",), None, request, param=options.names[1])
        logits = Outputs.of_rows(("scores",), rows).scores
        best = np.full(len(pairs), -np.inf, dtype=np.float32)
        np.maximum.at(best, encoded.owners, logits[:, 0])  # type: ignore[index]  # requested
        activation = self._activation(options)
        return PairScores(scores=activate(best[:, np.newaxis], activation)[:, 0], activation=activation, **measured)

    async def classify(self, inputs: Sequence[str | tuple[str, str]], options: ScoreOptions) -> Classifications:
        """Return the scores of each text or pair of texts by label; at least one input.

        Inputs that are too long are cut, pairs at the end of their second text, unless `long_documents` is `reject`.
        Errors are those of `embed`.
        """
        self._require(("scores",), task="classify")
        tokenization = self._pairs
        assert tokenization is not None  # noqa: S101 - classifiers have one
        request = self._begin()
        is_cut = options.long_documents != "reject"

        def encode() -> EncodedInputs:
            ids: list[list[int]] = []
            first_lengths: list[int] = []
            truncated = 0
            is_mixed = len({isinstance(each, str) for each in inputs}) > 1
            parts: Sequence[Any] = [[each] for each in inputs] if is_mixed else [inputs]
            for start, part in enumerate(parts):
                try:
                    if isinstance(part[0], str):
                        encoded = self._tokenizations[None].encode(part, truncate=None if is_cut else "NONE")
                    else:
                        encoded = tokenization.encode(part, long_documents="cut" if is_cut else None).inputs
                except InputTooLongError as error:
                    raise InputTooLongError(start + error.index, error.max_length) from None
                except TextTooLongError as error:
                    raise TextTooLongError(start + error.index, error.characters, error.limit) from None
                ids += encoded.ids
                first_lengths += encoded.first_lengths or map(len, encoded.ids)
                truncated += encoded.truncated
            has_types = self.description.has_token_types
            return EncodedInputs(ids, [0] * len(ids), truncated, first_lengths=first_lengths if has_types else None)

        characters = sum(len(each) if isinstance(each, str) else len(each[0]) + len(each[1]) for each in inputs)
        encoded = await self._in_thread(request, encode, characters)
        rows, measured = await self._run(encoded, ("scores",), None, request)
        activation = self._activation(options)
        logits = Outputs.of_rows(("scores",), rows).scores
        return Classifications(
            scores=activate(logits, activation),  # type: ignore[arg-type]  # requested
            labels=self.description.labels,
            activation=activation,
            **measured,
        )

    async def tokenize(
        self, texts: Sequence[str], *, input_type: str | None = None, add_special_tokens: bool = True
    ) -> list[list[Token]]:
        """Return the tokens of each text with its prompt, without truncation.

        Raises:
            RequestError: The model has no such prompt, or the texts have more tokens than a request may have.
        """
        task = choose_task(input_type, self.description)
        prompt = choose_prompt(input_type, self.description)
        tokenization = self._tokenization(task)

        def tokenize(text: str) -> list[Token]:
            return tokenization.tokens(prompt + text, add_special_tokens=add_special_tokens)

        rows: list[list[Token]] = []
        count = 0
        for index, text in enumerate(texts):
            try:
                rows.append(await asyncio.get_running_loop().run_in_executor(self._executor, tokenize, text))
            except TextTooLongError as error:
                raise TextTooLongError(index, error.characters, error.limit) from None
            count += len(rows[-1])
            if count > self._limits.max_request_tokens:
                raise TooManyTokensError(count, self._limits.max_request_tokens)
        return rows

    def _described(self, task: str | None) -> ModelDescription:
        """Return the description of the route of a task, or of the model if it has no routes."""
        return self.description.routes.get(task or "", self.description)

    def _tokenization(self, task: str | None) -> Tokenization:
        return self._tokenizations[task if task in self._tokenizations else None]

    def _require(self, outputs: Sequence[OutputName], task: Task | None = None) -> None:
        """Raise UnsupportedTaskError if the model does not have the outputs that a request needs."""
        description = self.description
        for name in outputs:
            wanted = task or TASKS[name]
            if wanted not in description.tasks:
                raise UnsupportedTaskError(self.spec.alias, description.kind, wanted, description.tasks)

    def _activation(self, options: ScoreOptions) -> Activation:
        raw = self.spec.defaults.raw_scores if options.raw is None else options.raw
        return "identity" if raw else self.description.activation

    def _default_pair_prompt(self) -> str:
        """Return the text before each query. A chat template contains its default instruction already."""
        description = self.description
        if description.pair_template is not None or description.default_prompt is None:
            return ""
        return description.prompts.get(description.default_prompt, "")

    def _begin(self) -> _Request:
        self._guard.check()
        return _Request(time.monotonic(), self._scheduler.waiting_tokens)

    async def _within(self, request: _Request, work: Awaitable[T]) -> T:
        """Wait for the tokenization of a request, but not longer than the whole request may take."""
        total_s = self._total_timeout_s(request.waiting)
        try:
            async with asyncio.timeout(total_s):
                return await work
        except TimeoutError:
            raise _timed_out(total_s, None) from None

    async def _in_thread(self, request: _Request, work: Callable[[], T], characters: int) -> T:
        """Tokenize a number of characters: on a thread if that takes long."""
        if characters <= _INLINE_CHARACTERS:
            return work()
        return await self._within(request, asyncio.get_running_loop().run_in_executor(self._executor, work))

    async def _run(
        self,
        encoded: EncodedInputs,
        outputs: tuple[OutputName, ...],
        task: str | None,
        request: _Request,
        *,
        token_factor: int = 1,
        param: str = "input",
    ) -> tuple[Sequence[tuple[Row, ...]], dict[str, Any]]:
        """Return the outputs of each tokenized input, and the fields of `Measured`.

        The inputs, which are in the field `param`, may have `token_factor` times the tokens of a request.
        """
        tokenize_s = time.monotonic() - request.started
        tokens = sum(map(len, encoded.ids))
        if tokens > (limit := self._limits.max_request_tokens * token_factor):
            raise TooManyTokensError(tokens, limit, param=param)
        described = self._described(task)
        batch = encoded.batch(outputs, task)
        if not described.excludes_prompt:
            batch = replace(batch, prompt_lengths=[0] * len(encoded.ids))
        lookup = self._loader.results.look_up(batch, outputs)
        self._on_lookup(self.spec.alias, lookup.hits, len(lookup.rows))
        computed: Sequence[tuple[Row, ...]] = []
        timing = Timing(queue_s=0.0, inference_s=0.0)
        submitted_at = None
        if lookup.rows:
            size = described.output_bytes(outputs, len(lookup.rows), sum(len(encoded.ids[row]) for row in lookup.rows))
            inputs = batch if len(lookup.rows) == len(encoded.ids) else batch.select(lookup.rows)
            job = InferenceJob(inputs, outputs, output_bytes=size)
            computed, timing = await self._wait_for(job, request)
            submitted_at = job.arrived_at
        self._on_stages(
            StageRecord(
                model=self.spec.alias,
                inputs=len(encoded.ids),
                tokens=tokens,
                truncated=encoded.truncated,
                started_at=request.started,
                tokenize_s=tokenize_s,
                submitted_at=submitted_at,
                timing=timing,
            )
        )
        measured = {"tokens": tokens, "truncated": encoded.truncated, "tokenize_s": tokenize_s, "timing": timing}
        # The many texts of a batch would displace those that are requested again.
        return lookup.complete(computed, keep=not is_background()), measured

    async def _wait_for(self, job: InferenceJob, request: _Request) -> tuple[Sequence[tuple[Row, ...]], Timing]:
        """Wait for the result of a request as long as the model makes progress. Only in the background without limit."""
        self._scheduler.submit(job)
        timer: asyncio.TimerHandle | None = None

        def check() -> None:
            nonlocal timer
            if job.result.done():
                return
            try:
                timer = job.loop.call_later(self._remaining_s(job, request), check)
            except DeadlineExceededError as error:
                self._scheduler.cancel(job)
                job.result.set_exception(error)

        check()
        try:
            return await job.result
        finally:
            if timer is not None:
                timer.cancel()
            if job.result.cancelled():
                self._scheduler.cancel(job)

    def _remaining_s(self, job: InferenceJob, request: _Request) -> float:
        """Return how long a request may still wait; raise DeadlineExceededError if it has waited too long."""
        timeout_s = self._limits.request_timeout_s
        total_s = math.inf if job.background else self._total_timeout_s(request.waiting)
        idle_until = max(request.started, self._scheduler.progressed_at) + timeout_s
        now, end = time.monotonic(), request.started + total_s
        if now >= end:
            raise _timed_out(total_s, job)
        if now >= idle_until:
            raise DeadlineExceededError(
                f"The model `{self.spec.alias}` made no progress within {timeout_s:g} seconds. "
                + _remedy(job, "EMB_PROVIDER_REQUEST_TIMEOUT_S"),
                can_repeat=job.started_at is None,
            )
        return min(idle_until, end) - now

    def _total_timeout_s(self, waiting: int) -> float:
        """Return how long a request may take before which a number of tokens waited, at the present speed."""
        limits = self._limits
        if limits.request_total_timeout_s is not None:
            return limits.request_total_timeout_s
        needed_s = (limits.max_request_tokens + waiting) / self._scheduler.tokens_per_s
        return max(_TOTAL_FACTOR * limits.request_timeout_s, _SPEED_FACTOR * needed_s)

    async def _encode(
        self,
        request: _Request,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        task: str | None,
        prompt: str,
        options: EmbedOptions,
    ) -> EncodedInputs:
        tokenization, longest = self._tokenization(task), self._described(task).max_length
        limit = _token_limit(options.truncate_prompt_tokens, longest)
        truncate = options.truncate or self.spec.truncate
        if options.truncate is None and truncate == "NONE" and limit < longest:
            # A request that sets a limit wants its inputs truncated, even if the model's default is to reject them.
            truncate = None
        if truncate == "AUTO":
            truncate = None

        def encode(texts: Sequence[str]) -> EncodedInputs:
            return tokenization.encode(texts, prompt=prompt, truncate=truncate, max_tokens=limit, task=task)

        if isinstance(inputs[0], str):
            texts: Sequence[str] = inputs  # type: ignore[assignment]  # the API rejects mixed inputs
            if tokenization.is_known and sum(map(len, texts)) <= _INLINE_CHARACTERS:
                return encode(texts)
            return await self._within(request, self._encode_in_parts(texts, encode))
        rows: Sequence[Sequence[int]] = inputs  # type: ignore[assignment]  # likewise
        if self.spec.token_input == "model":
            return tokenization.encode_token_ids(rows, truncate=truncate, max_tokens=limit)

        async def decode_and_encode() -> EncodedInputs:
            decode = asyncio.get_running_loop().run_in_executor(self._executor, self._decode, rows, tokenization)
            return await self._encode_in_parts(await decode, encode)

        return await self._within(request, decode_and_encode())

    async def _encode_in_parts(
        self, texts: Sequence[str], encode: Callable[[Sequence[str]], EncodedInputs]
    ) -> EncodedInputs:
        """Tokenize texts on the executor, some at a time.

        So requests take turns, a request that is cancelled stops, and only the tokens that are kept take memory.
        """
        ids: list[list[int]] = []
        prompt_lengths: list[int] = []
        attended: list[int] = []
        tokens = truncated = 0
        for part in _parts(texts):
            try:
                encoded = await asyncio.get_running_loop().run_in_executor(self._executor, encode, part)
            except InputTooLongError as error:
                raise InputTooLongError(len(ids) + error.index, error.max_length) from None
            except TextTooLongError as error:
                raise TextTooLongError(len(ids) + error.index, error.characters, error.limit) from None
            ids += encoded.ids
            prompt_lengths += encoded.prompt_lengths
            attended += encoded.attended or ()
            truncated += encoded.truncated
            tokens += sum(map(len, encoded.ids))
            if tokens > _DECODED_FACTOR * self._limits.max_request_tokens:
                break  # the caller rejects them
        return EncodedInputs(ids=ids, prompt_lengths=prompt_lengths, truncated=truncated, attended=attended or None)

    def _decode(self, rows: Sequence[Sequence[int]], tokenization: Tokenization) -> list[str]:
        """Return the texts of rows of OpenAI's token ids.

        Raises:
            TokenInputError: The model does not accept them, or they are ids of another tokenizer.
            TooManyTokensError: They are more than a request may have.
            BodyTooLargeError: The texts are larger than a request body may be.
        """
        alias = self.spec.alias
        if self.spec.token_input == "reject":
            raise _unaccepted(f"The model `{alias}` does not accept token ids.")
        if self.spec.token_input == "auto" and tokenization.are_complete(rows):
            raise _unaccepted(
                f"The token ids in 'input' begin and end with the special tokens of the model `{alias}`, but it expects ids "
                "of OpenAI's tokenizer cl100k_base."
            )
        limit = self._limits.max_request_tokens
        if (count := sum(map(len, rows))) > limit:
            raise TooManyTokensError(count, limit)
        texts: list[str] = []
        remaining = self._limits.max_body_bytes
        for index, row in enumerate(rows):
            try:
                texts.append(cl100k.decode(row, remaining))
                remaining -= len(texts[-1])
            except ValueError as error:
                raise _unaccepted(
                    f"Invalid 'input[{index}]': these are not token ids of OpenAI's tokenizer cl100k_base, which the model "
                    f"`{alias}` expects: {error}."
                ) from error
        return texts


def _compare(query: Embeddings, documents: Embeddings) -> list[float]:
    """Return how similar a query is to each document, by one of their outputs other than dense vectors."""
    if query.multi_vector is not None:
        return [maxsim(query.multi_vector[0], vectors) for vectors in documents.multi_vector or ()]
    (source,) = query.sparse or ()
    return [sparse_dot(source, vector) for vector in documents.sparse or ()]


def _unaccepted(reason: str) -> TokenInputError:
    return TokenInputError(
        f"{reason} Send text (in LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False)), or set token_input of the "
        "model in EMB_PROVIDER_MODEL_MAPPING: 'model' for ids of the model's own tokenizer, 'cl100k' for OpenAI's."
    )


def _timed_out(total_s: float, job: InferenceJob | None) -> DeadlineExceededError:
    """Return the error of a request that took too long; None if its inputs were not tokenized."""
    message = f"The request was not answered within {total_s:g} seconds. "
    message += _remedy(job, "EMB_PROVIDER_REQUEST_TOTAL_TIMEOUT_S")
    return DeadlineExceededError(message, can_repeat=job is not None and job.started_at is None)


def _remedy(job: InferenceJob | None, setting: str) -> str:
    if job is not None and job.started_at is None:
        return f"It was waiting for other requests. Send it again later. The operator can increase {setting}."
    return f"Send fewer or shorter texts per request. The operator can increase {setting}."


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield consecutive texts with a limited number of characters in total, at least one text at a time."""
    start = characters = 0
    for index, text in enumerate(texts):
        if index > start and characters + len(text) > _PART_CHARACTERS:
            yield texts[start:index]
            start, characters = index, 0
        characters += len(text)
    yield texts[start:]


@dataclass(frozen=True, slots=True)
class _Request:
    """When a request started, on the monotonic clock, and how many tokens waited then."""

    started: float
    waiting: int


def _token_limit(requested: int | None, longest: int) -> int:
    if requested is None or requested == -1:
        return longest
    if not 1 <= requested <= longest:
        raise RequestError(
            f"Invalid value for 'truncate_prompt_tokens' = {requested}. Supported values: [-1, 1 to {longest}].",
            param="truncate_prompt_tokens",
        )
    return requested


class _BackendLoader:
    """Loads and checks the backend of one model, at first and after each crash. Used on the thread of the model.

    It does not refer to the engine, because a cycle would keep the tokenizer of an unloaded model in memory.
    """

    def __init__(self, load: Callable[[], Backend], cache: ResultCache) -> None:
        self._load = load
        self._cache = cache
        self.results: ModelResults = cache.open()
        """Those of the backend that was loaded last."""
        self._tokenizer_json: dict[str | None, str] | None = None
        self.tokenizations: dict[str | None, Tokenization]
        """Those of the routes of an asymmetric model, by task, or that of any other model under None."""
        self.memory_bytes: int

    def load(self) -> Backend:
        backend = self._load()
        try:
            self._prepare_tokenization(backend.description)
            self.check(backend)
            self.memory_bytes = backend.memory_bytes
        except BaseException:
            backend.close()
            raise
        # After a crash, the files may contain another model than before.
        self.results.close()
        self.results = self._cache.open()
        freeze_gc()
        return backend

    def _prepare_tokenization(self, description: ModelDescription) -> None:
        described: dict[str | None, ModelDescription] = dict(description.routes.items()) or {None: description}
        files = {task: each.tokenizer_json for task, each in described.items()}
        if self._tokenizer_json is None:
            self.tokenizations = {task: Tokenization(each) for task, each in described.items()}
            self._tokenizer_json = files
        elif self._tokenizer_json != files:
            # The waiting requests were tokenized for the model that was loaded before.
            raise LoadError("its files now contain another model than before it was restarted")

    def check(self, backend: Backend) -> None:
        """Run a test text; raise LoadError if the model fails or returns a result that is not finite."""
        tasks = [task for task in self.tokenizations if task is not None]
        encoded = [tokenization.encode(["This is a test."]).batch() for tokenization in self.tokenizations.values()]
        batch = TokenBatch.join([(each, 0) for each in encoded])
        if tasks:
            batch = replace(batch, tasks=tasks)
        try:
            outputs = backend.run(batch)
        except Exception as error:
            raise LoadError(f"it cannot run on a test text: {type(error).__name__}: {error}") from error
        if not finite_rows(outputs, len(batch.ids)).all():
            raise LoadError(
                "its result for a test text is not finite: its weights are damaged, or its precision is too low"
            )
