"""Answers the lines of batches with the functions that answer interactive requests."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request

from emb_model_provider.api.dependencies import RECORD, Services, use_model
from emb_model_provider.api.errors import response_for
from emb_model_provider.api.routes import embeddings, rerank
from emb_model_provider.batch_jobs.types import Answer
from emb_model_provider.concurrency import Turns
from emb_model_provider.errors import (
    DeadlineExceededError,
    DeviceLostError,
    OperationCancelledError,
    RequestError,
    RetryLaterError,
    is_failure,
)
from emb_model_provider.observability.logs import request_id as log_request_id
from emb_model_provider.observability.metrics import RequestRecord
from emb_model_provider.serving.jobs import in_background

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from starlette.responses import Response
    from starlette.types import Message, Receive

    from emb_model_provider.api.routes.embeddings import EmbeddingCall
    from emb_model_provider.serving.results import Embeddings

_MAX_VIEW_AGE_S = 10.0
"""How old the list of the models on disk may be: it is read for each line of a file."""
_OF_LINE = {"input", "user"}
"""Fields in which the lines of a group may differ. `user` is not read."""
_GROUP_INPUTS = 256
_GROUP_CHARACTERS = 128 * 1024
"""Limits of the inputs of all lines of a group, so that it has several full batches of the model, but takes little memory."""


class ApiCalculator:
    """Checks and answers lines as `POST /v1/embeddings` and `POST /v1/rerank` do."""

    def __init__(self, services: Services, on_lines: Callable[[Sequence[Answer]], None]) -> None:
        """Create it; `on_lines` is called with the answers."""
        self._services = services
        self._on_lines = on_lines

    def check(self, endpoint: str, body: Mapping[str, Any]) -> int:
        """Return the number of inputs of a line. Can be called on any thread.

        Raises:
            RequestError: An interactive request with this body would be refused, whatever its model says.
        """
        limits = self._services.settings.limits
        if endpoint == embeddings.PATH:
            embedding_call = embeddings.parse_fields(body, limits)
            model, count = embedding_call.model, len(embedding_call.inputs)
        else:
            rerank_call = rerank.parse_rerank(body, limits)
            model, count = rerank_call.model, len(rerank_call.documents)
        if model is not None:
            self._check_model(model)
        return count

    async def answer(self, endpoint: str, body: Mapping[str, Any], request_id: str) -> Answer:
        """Return the answer to a line, an error included. It has the same id if the line is answered again.

        Raises:
            ProviderError: The line may be answered later, when its model is loaded again or has time.
        """
        previous = log_request_id.set(request_id)
        record = RequestRecord(method="POST", path=endpoint, request_id=request_id)
        request = _request(record)
        try:
            with in_background():
                response = await self._respond(endpoint, request, body, request_id)
        except BaseException as error:
            if not is_failure(error) or _can_pass(error):
                raise
            response = response_for(error)
        finally:
            log_request_id.reset(previous)
        answer = Answer(response.status_code, bytes(response.body), record.tokens)
        self._on_lines([answer])
        return answer

    def group(self, endpoint: str, bodies: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Divide lines into groups that can be computed together: with equal options.

        Lines for another endpoint, and invalid ones, are alone.
        """
        limits = self._services.settings.limits
        longest = min(_GROUP_CHARACTERS, limits.max_request_tokens)
        groups: list[list[int]] = []
        growing: dict[tuple[bool, bytes], tuple[list[int], int, int]] = {}
        for position, body in enumerate(bodies):
            group = [position]
            if endpoint == embeddings.PATH:
                try:
                    inputs = embeddings.parse_inputs(body, limits)
                    options = {name: value for name, value in body.items() if name not in _OF_LINE}
                    key = isinstance(inputs[0], str), orjson.dumps(options, option=orjson.OPT_SORT_KEYS)
                except (RequestError, TypeError):  # TypeError: values that are nested too deep
                    pass
                else:
                    count, size = len(inputs), sum(map(len, inputs))
                    other, others, size_of_others = growing.get(key, (group, 0, 0))
                    if others + count <= _GROUP_INPUTS and size_of_others + size <= longest:
                        group, count, size = other, others + count, size_of_others + size
                    growing[key] = group, count, size
            if group[-1] != position:
                group.append(position)
            else:
                groups.append(group)
        return groups

    async def answer_group(self, endpoint: str, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Return the answers to the lines of a group, which have equal options.

        Raises:
            ProviderError: The inputs cannot be computed together.
        """
        limits = self._services.settings.limits
        call = embeddings.parse_fields(bodies[0], limits)
        inputs = [call.inputs, *(embeddings.parse_inputs(body, limits) for body in bodies[1:])]
        request = _request(RequestRecord(method="POST", path=endpoint, request_id=""))
        # After a crash of the model, each line is computed alone, and then has as many attempts as any request.
        with in_background(max_attempts=1):
            async with use_model(request, self._services, call.model) as model:
                together: Any = list(itertools.chain.from_iterable(inputs))
                computed = await model.engine.embed(together, call.options_for(model.defaults))
        answers = await asyncio.to_thread(_render, computed, list(map(len, inputs)), call, model.name)
        self._on_lines(answers)
        return answers

    async def _respond(self, endpoint: str, request: Request, body: Mapping[str, Any], request_id: str) -> Response:
        if endpoint == embeddings.PATH:
            return await embeddings.create_response(
                await embeddings.embed_request(request, self._services, fields=body)
            )
        ranking = await rerank.rank(request, self._services, fields=body)
        if ranking.call.is_tei:
            return await ranking.response(ranking.tei_results)
        return await ranking.response(lambda: ranking.body(f"rerank-{request_id}"))

    def _check_model(self, name: str) -> None:
        services = self._services
        registry = services.registry
        if registry.answers_unknown or registry.find(name) is not None:
            return
        index = services.manager.index
        view = index.recent_view(_MAX_VIEW_AGE_S) or index.view()
        if services.settings.serves_cached and view.find(name) is not None:
            return
        raise registry.not_found(name)


def _render(computed: Embeddings, counts: Sequence[int], call: EmbeddingCall, model: str) -> list[Answer]:
    """Return the answers to lines that have `counts` inputs."""
    turns = Turns()
    stops = list(itertools.accumulate(counts))
    tokens = [sum(computed.input_tokens[stop - count : stop]) for stop, count in zip(stops, counts, strict=True)]
    answers: list[Answer] = []
    try:
        for body in embeddings.render_responses(computed, counts, call.encoding, model, call.output_type):
            answers.append(Answer(200, body, tokens[len(answers)]))
            turns.give()
    except RequestError as error:
        response = response_for(error)
        answers = [Answer(response.status_code, bytes(response.body), each) for each in tokens]
    return answers


def _request(record: RequestRecord) -> Request:
    scope = {"type": "http", "method": record.method, "path": record.path, "headers": [], RECORD: record}
    return Request(scope, _empty_body())


def _can_pass(error: BaseException) -> bool:
    """Return whether the same line can be answered later."""
    if isinstance(error, DeadlineExceededError):
        return error.can_repeat
    return isinstance(error, (RetryLaterError, DeviceLostError, OperationCancelledError))


def _empty_body() -> Receive:
    """Return what receives an empty body from a client that never disconnects."""
    messages: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    return receive
