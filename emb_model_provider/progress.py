"""Progress and cancellation of long work, from the thread or process that does it to the user who waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from emb_model_provider.errors import OperationCancelledError

Phase = Literal["resolve", "download", "verify", "compile", "compare", "load"]
"""Phases of preparing a model: look it up on its hub, download its files, hash them, compile the model, compare the
compiled model with the reference, load it into memory."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the preparation of one model has come."""

    phase: Phase
    model: str
    """The repository, as its hub calls it."""
    done_bytes: int = 0
    """Over all files together. It decreases if a file is downloaded again."""
    total_bytes: int | None = None
    """None if the work is not measured in bytes."""
    step: str = ""
    """The step of compiling or comparing, such as `convert`."""


OnProgress = Callable[[Progress], None]
"""Called from one thread at a time, not always the same one. Must return quickly."""


def ignore_progress(_: Progress) -> None:
    """Do nothing. The default of `on_progress` parameters."""


class CancelToken:
    """Tells long work to stop. Thread-safe; cancelling cannot be undone."""

    def __init__(self, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        """Create a token.

        Args:
            is_cancelled: A further condition under which the work stops. It is called on any thread.
        """
        self._event = threading.Event()
        self._condition = is_cancelled

    def cancel(self) -> None:
        """Tell the work to stop."""
        self._event.set()

    @property
    def is_cancelled(self) -> bool:
        return self._event.is_set() or self._condition()

    def raise_if_cancelled(self) -> None:
        """Stop the work of the caller if the token was cancelled.

        Raises:
            OperationCancelledError: The token was cancelled.
        """
        if self.is_cancelled:
            raise OperationCancelledError("The operation was cancelled.")
