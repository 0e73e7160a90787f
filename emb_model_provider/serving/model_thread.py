"""The thread that owns a model: it loads the backend, runs its lanes, and loads it anew when they end.

A model that keeps failing is given up, and whoever waits for it hears why. No other model notices.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Literal

from emb_model_provider.errors import ModelNotReadyError
from emb_model_provider.serving.memory_tuning import trim_malloc

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.backends.base import Backend, ModelDescription
    from emb_model_provider.serving.batcher import BatchPolicy
    from emb_model_provider.serving.scheduler import BatchScheduler, Timings

logger = logging.getLogger(__name__)

StateChange = Literal["restarting", "running", "failed"]
"""What becomes of a model whose lanes ended: it is loaded anew, it runs again, it is given up."""

_RESTART_WINDOW_S = 600.0


class ModelThread:
    """Runs one model: one thread creates and closes the backend, and is the first of its lanes."""

    def __init__(
        self,
        model: str,
        streams: BatchScheduler,
        *,
        load: Callable[[], Backend],
        policy_for: Callable[[ModelDescription], BatchPolicy],
        on_change: Callable[[StateChange, str], None],
        timings: Timings,
    ) -> None:
        """Prepare the thread.

        `load` is called again where the model has to be loaded anew. `on_change` gets a reason, which is empty for
        `running`. Both are called on the model's thread.
        """
        self._model = model
        self._scheduler = streams
        self._load = load
        self._policy_for = policy_for
        self._on_change = on_change
        self._timings = timings
        self._restarts: list[float] = []
        self._thread = threading.Thread(target=self._main, name=f"model-{model}", daemon=True)
        self._loaded: Future[ModelDescription] = Future()

    def start(self) -> Future[ModelDescription]:
        """Start the thread; the future is done once the model is loaded, or carries why it is not."""
        # Else whoever stops waiting for it would cancel it under the thread.
        self._loaded.set_running_or_notify_cancel()
        self._thread.start()
        return self._loaded

    def request_stop(self) -> None:
        """As `stop`, without waiting: also while the model is being loaded."""
        self._scheduler.stop()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Take no more jobs, finish those that were taken, close the backend. Blocks until that is done.

        Returns False where it was not done within `timeout_s` seconds: a lane hangs.
        """
        self._scheduler.stop()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            backend = self._load()
            self._scheduler.open(backend, self._policy_for(backend.description))
        except BaseException as error:  # noqa: BLE001 - whatever it is, whoever waits for the model must hear it
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(backend.description)
        try:
            self._serve(backend)
        except BaseException as error:  # such as no memory for another thread: nobody may wait for ever
            logger.exception("model %s: its thread ended", self._model)
            self._give_up(_describe(error))

    def _serve(self, backend: Backend) -> None:
        """Serve until told to stop, or given up."""
        loaded: Backend | None = backend
        while loaded is not None:
            crash = self._scheduler.run(loaded)
            try:
                loaded.close()
            except Exception:
                logger.exception("model %s could not be closed in good order", self._model)
            loaded = None
            trim_malloc()
            if crash is not None:
                loaded = self._restart(crash)

    def _restart(self, crash: BaseException) -> Backend | None:
        """Return the model loaded once more, with what was not answered in its queue; None where it is given up."""
        reason = _describe(crash)
        while True:
            now = time.monotonic()
            self._restarts = [then for then in self._restarts if now - then < _RESTART_WINDOW_S]
            if len(self._restarts) >= len(self._timings.restart_pauses_s):
                self._give_up(
                    f"{reason} It was reloaded {len(self._restarts)} times within {_RESTART_WINDOW_S / 60:.0f} minutes."
                )
                return None
            pause_s = self._timings.restart_pauses_s[len(self._restarts)]
            self._restarts.append(now)
            logger.error("model %s is loaded anew: %s", self._model, reason)
            self._on_change("restarting", reason)
            time.sleep(pause_s)
            try:
                backend = self._load()
            except BaseException as error:  # noqa: BLE001 - it counts as a restart, and is told as the reason
                reason = _describe(error)
                continue
            self._scheduler.resume(backend)
            logger.warning("model %s is back", self._model)
            self._on_change("running", "")
            return backend

    def _give_up(self, reason: str) -> None:
        logger.error("model %s is given up: %s", self._model, reason)
        self._on_change("failed", reason)
        self._scheduler.fail_all(
            ModelNotReadyError(
                f"The model `{self._model}` failed: {reason}",
                retry_after_s=self._timings.retry_after_failure_s,
            )
        )


def _describe(error: BaseException) -> str:
    words = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {words[0]}" if words else type(error).__name__
    return reason if reason.endswith(".") else f"{reason}."
