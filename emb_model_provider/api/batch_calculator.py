"""Answers the lines of batches with the functions that answer interactive requests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from emb_model_provider.api.dependencies import RECORD, Services
from emb_model_provider.api.errors import response_for
from emb_model_provider.api.routes import embeddings, rerank
from emb_model_provider.batch_jobs.types import Answer
from emb_model_provider.errors import (
    DeadlineExceededError,
    DeviceLostError,
    OperationCancelledError,
    RetryLaterError,
    is_failure,
)
from emb_model_provider.observability.logs import request_id as log_request_id
from emb_model_provider.observability.metrics import RequestRecord
from emb_model_provider.serving.jobs import in_background

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.responses import Response
    from starlette.types import Message, Receive

_MAX_VIEW_AGE_S = 10.0
"""How old the list of the models on disk may be: it is read for each line of a file."""


class ApiCalculator:
    """Checks and answers lines as `POST /v1/embeddings` and `POST /v1/rerank` do."""

    def __init__(self, services: Services, on_line: Callable[[int, int], None]) -> None:
        """Create it; `on_line` is called with the status and the tokens of each answer."""
        self._services = services
        self._on_line = on_line

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
        scope = {"type": "http", "method": "POST", "path": endpoint, "headers": [], RECORD: record}
        request = Request(scope, _empty_body())
        try:
            with in_background():
                response = await self._respond(endpoint, request, body, request_id)
        except BaseException as error:
            if not is_failure(error) or _can_pass(error):
                raise
            response = response_for(error)
        finally:
            log_request_id.reset(previous)
        self._on_line(response.status_code, record.tokens)
        return Answer(response.status_code, bytes(response.body), record.tokens)

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
