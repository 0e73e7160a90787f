"""The thread that owns a model: it loads the backend, runs its first stream, and restarts it after a crash.

A model that keeps crashing fails, and its requests are answered with the reason. Other models are not affected.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Literal

from emb_model_provider.concurrency import ForkGuard, start_thread
from emb_model_provider.errors import DeviceLostError, ModelNotReadyError
from emb_model_provider.formatting import describe_error
from emb_model_provider.serving.config import batch_policy
from emb_model_provider.serving.memory_tuning import trim_malloc

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.backends.base import Backend, ModelDescription
    from emb_model_provider.serving.config import EngineConfig
    from emb_model_provider.serving.scheduler import BatchScheduler

logger = logging.getLogger(__name__)

_first_start: ForkGuard | None = None
"""Of the first model that was loaded in this process, or in one from which it was forked."""

StateChange = Literal["restarting", "running", "failed", "device lost"]
"""State of a model after a crash. "device lost": it has failed, and only another process can use its GPU again."""

_RESTART_WINDOW_S = 600.0


class ModelThread:
    """Creates, runs and closes the backend of one model on its own thread."""

    def __init__(
        self,
        model: str,
        scheduler: BatchScheduler,
        load: Callable[[], Backend],
        config: EngineConfig,
        on_change: Callable[[StateChange, str], None],
    ) -> None:
        self._model = model
        self._scheduler = scheduler
        self._load = load
        self._batching = config.batching
        self._timings = config.timings
        self._on_change = on_change
        self._restarts: list[float] = []
        """Times of the restarts within the last minutes."""
        self._thread = threading.Thread(target=self._main, name=f"model-{model}", daemon=True)
        self._loaded: Future[ModelDescription] = Future()

    def start(self) -> Future[ModelDescription]:
        """Start the thread; return a future for the description of the loaded model.

        Raises:
            ForkedProcessError: A model was loaded before this process was forked. The threads of the runtimes of models
                do not exist here, so that loading another one could wait for ever.
        """
        global _first_start
        _first_start = _first_start or ForkGuard("A model was loaded")
        _first_start.check()
        # Marked as running, because a caller that stops waiting would cancel the future that the thread completes.
        self._loaded.set_running_or_notify_cancel()
        start_thread(self._thread)
        return self._loaded

    def stop(self, timeout_s: float | None) -> bool:
        """Answer the accepted requests and close the backend; return False if that took longer than `timeout_s`."""
        self._scheduler.stop()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        backend: Backend | None
        try:
            backend = self._load()
            description = backend.description
            self._scheduler.open(backend, batch_policy(self._batching, description))
        except BaseException as error:  # noqa: BLE001 - the caller of `start` must get any error
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(description)
        try:
            while backend is not None:
                crash = self._scheduler.run(backend)
                try:
                    backend.close()
                except Exception:
                    logger.exception("model %s could not be closed", self._model)
                backend = None  # so that all its memory is free before a restart
                trim_malloc()
                if crash is not None:
                    backend = self._restart(crash)
        except BaseException as error:  # such as a thread that cannot be started: no request may wait forever
            logger.exception("model %s: its thread crashed", self._model)
            self._fail(_reason(error))

    def _restart(self, crash: BaseException) -> Backend | None:
        """Load the model again and queue its unanswered requests; return None if it has failed."""
        reason = _reason(crash)
        if isinstance(crash, DeviceLostError):
            advice = "Restart the service; with EMB_PROVIDER_SUPERVISE=true it restarts by itself."
            self._fail(f"{reason} {advice}", "device lost")
            return None
        while True:
            now = time.monotonic()
            self._restarts = [then for then in self._restarts if now - then < _RESTART_WINDOW_S]
            if len(self._restarts) >= len(self._timings.restart_pauses_s):
                self._fail(
                    f"{reason} It was restarted {len(self._restarts)} times within "
                    f"{_RESTART_WINDOW_S / 60:.0f} minutes."
                )
                return None
            pause_s = self._timings.restart_pauses_s[len(self._restarts)]
            self._restarts.append(now)
            logger.error("model %s crashed, restarting it: %s", self._model, reason)
            self._on_change("restarting", reason)
            time.sleep(pause_s)
            try:
                backend = self._load()
            except BaseException as error:  # noqa: BLE001 - a load that fails counts as a restart
                reason = _reason(error)
                continue
            self._scheduler.resume(backend)
            logger.warning("model %s is running again", self._model)
            self._on_change("running", "")
            return backend

    def _fail(self, reason: str, change: StateChange = "failed") -> None:
        logger.error("model %s failed: %s", self._model, reason)
        self._on_change(change, reason)
        self._scheduler.fail_all(
            ModelNotReadyError(
                f"The model `{self._model}` failed: {reason}", retry_after_s=self._timings.retry_after_failure_s
            )
        )


def _reason(error: BaseException) -> str:
    return f"{describe_error(error).rstrip('.')}."
