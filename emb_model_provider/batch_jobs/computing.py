"""Computes lines of a chunk: together where possible, and again if the model cannot compute them now."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from emb_model_provider.batch_jobs.lines import error_body, line_id
from emb_model_provider.batch_jobs.types import Answer
from emb_model_provider.errors import (
    DeadlineExceededError,
    DeviceLostError,
    OperationCancelledError,
    QueueFullError,
    RequestError,
    RetryLaterError,
    is_failure,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from emb_model_provider.batch_jobs.lines import InputLine
    from emb_model_provider.batch_jobs.types import Calculator

_MAX_ATTEMPTS = 3
"""A line that took too long in this many attempts fails."""
_MAX_RETRY_S = 30.0
_STOPPING = "The model is stopping."


class Computation:
    """Lines of a chunk that are being computed. If a call is cancelled, the answers so far remain."""

    def __init__(
        self, calculator: Calculator, endpoint: str, sha256: str, on_wait: Callable[[str], Awaitable[None]]
    ) -> None:
        """Create a computation without answers.

        Args:
            calculator: Computes the lines.
            endpoint: The route of all lines.
            sha256: Digest of the input file.
            on_wait: Called with the reason when lines cannot be computed now.
        """
        self.answers: dict[int, Answer] = {}
        """By the number of the line."""
        self.waiting: dict[int, RetryLaterError] = {}
        """Why lines have no answer, by their numbers."""
        self._calculator = calculator
        self._endpoint = endpoint
        self._sha256 = sha256
        self._on_wait = on_wait
        self._alone: set[int] = set()
        """Lines that are not to be grouped again."""

    async def run(self, lines: Sequence[InputLine], stall_s: float) -> None:
        """Compute lines, again and again until all have an answer, or none of them gets one for `stall_s` seconds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + stall_s
        while True:
            await self._answer_groups(self._groups(lines))
            left = [line for line in lines if line.number not in self.answers]
            if len(left) < len(lines):
                deadline = loop.time() + stall_s
            if not left or loop.time() >= deadline:
                return
            lines = left
            errors = [self.waiting[line.number] for line in left]
            await self._on_wait(errors[0].message)
            await asyncio.sleep(min(_MAX_RETRY_S, max(error.retry_after_s for error in errors)))

    def _groups(self, lines: Sequence[InputLine]) -> list[list[InputLine]]:
        together = [line for line in lines if line.number not in self._alone]
        groups = self._calculator.group(self._endpoint, [line.body for line in together])
        return [
            *([together[position] for position in group] for group in groups),
            *([line] for line in lines if line.number in self._alone),
        ]

    async def _answer_groups(self, groups: Iterable[Sequence[InputLine]]) -> None:
        async with asyncio.TaskGroup() as running:
            for group in groups:
                running.create_task(self._answer_group(group))
                await asyncio.sleep(0)  # requests of other clients come between

    async def _answer_group(self, lines: Sequence[InputLine]) -> None:
        if len(lines) == 1:
            self._note(lines, [await self._answer(lines[0])])
            return
        results: Sequence[Answer | RetryLaterError]
        try:
            results = await self._calculator.answer_group(self._endpoint, [line.body for line in lines])
        except (RequestError, QueueFullError):
            # Before anything was computed, so that it costs little to find the lines that are the cause.
            half = len(lines) // 2
            await self._answer_groups((lines[:half], lines[half:]))
            return
        except RetryLaterError as error:
            results = [error] * len(lines)
        except (DeviceLostError, OperationCancelledError) as error:
            results = [_later(error.message)] * len(lines)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                if _is_cancelled():
                    raise
                results = [_later(_STOPPING)] * len(lines)
            elif is_failure(error):
                self._alone.update(line.number for line in lines)
                await self._answer_groups([[line] for line in lines])
                return
            else:
                raise
        self._note(lines, results)

    async def _answer(self, line: InputLine) -> Answer | RetryLaterError:
        request_id = line_id("req", self._sha256, line.number)
        attempt = 1
        while True:
            try:
                return await self._calculator.answer(self._endpoint, line.body, request_id)
            except RetryLaterError as error:
                return error
            except asyncio.CancelledError:
                if _is_cancelled():
                    raise
                return _later(_STOPPING)
            except (DeviceLostError, OperationCancelledError) as error:
                return _later(error.message)
            except BaseException as error:
                if not is_failure(error):
                    raise
                is_timeout = isinstance(error, DeadlineExceededError) and error.can_repeat
                if not is_timeout or attempt == _MAX_ATTEMPTS:
                    return Answer(*error_body(error))
                attempt += 1

    def _note(self, lines: Sequence[InputLine], results: Sequence[Answer | RetryLaterError]) -> None:
        for line, result in zip(lines, results, strict=True):
            if isinstance(result, Answer):
                self.answers[line.number] = result
                self.waiting.pop(line.number, None)
            else:
                self.waiting[line.number] = result


def _is_cancelled() -> bool:
    """Return whether a CancelledError is that of the present task, and not one of the model."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _later(reason: str) -> RetryLaterError:
    return RetryLaterError(reason, retry_after_s=1.0)
