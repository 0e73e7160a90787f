"""Retries requests that failed for a moment, and waits as long as a hub asks for."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from emb_model_provider.errors import ProviderError

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.progress import CancelToken
    from emb_model_provider.transfer.repository import Failure

T = TypeVar("T")

logger = logging.getLogger(__name__)

_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long requests are retried."""

    attempts: int = 5
    """Number of attempts for one request."""
    first_wait_s: float = 1.0
    """Wait before the second attempt; it doubles with each further one."""
    max_wait_s: float = 60.0
    max_retry_after_s: float = 1800.0
    """Longest `Retry-After` that is honored. A hub that asks for more fails the repository."""

    def run(
        self, action: Callable[[], T], explain: Callable[[Exception], Failure], cancel: CancelToken, what: str
    ) -> T:
        """Return the result of `action`, which is repeated after temporary failures.

        Raises:
            ProviderError: That of the last attempt, as `explain` reports it. An error of this package is not retried.
            OperationCancelledError: `cancel` was cancelled.
        """
        attempt = 1
        while True:
            cancel.raise_if_cancelled()
            try:
                return action()
            except ProviderError:
                raise
            except Exception as error:  # noqa: BLE001 - the clients raise errors of several libraries
                failure = explain(error)
                cancel.raise_if_cancelled()
                self.wait(failure, attempt, cancel, what)
                attempt += 1

    def wait(self, failure: Failure, attempt: int, cancel: CancelToken, what: str) -> None:
        """Wait before the next attempt, or raise the error of the failure if there is to be none."""
        asked_s = failure.retry_after_s
        if not failure.is_temporary or attempt >= self.attempts or (asked_s or 0) > self.max_retry_after_s:
            raise failure.error
        wait_s = asked_s if asked_s is not None else min(self.max_wait_s, self.first_wait_s * 2 ** (attempt - 1))
        logger.info("%s failed, attempt %d of %d in %g s: %s", what, attempt + 1, self.attempts, wait_s, failure.error)
        deadline = time.monotonic() + wait_s
        while (left_s := deadline - time.monotonic()) > 0:
            cancel.raise_if_cancelled()
            time.sleep(min(_POLL_S, left_s))
