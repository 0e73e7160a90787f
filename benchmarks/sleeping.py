"""The service with models that sleep: `python -m benchmarks.sleeping`, with the settings of the service.

A small machine then answers as one with many processors would, as far as the model is concerned: each stream of a model is
a processor that computes for the time that BENCHMARKS_SLEEP_S says, and needs almost no real one.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from emb_model_provider.artifacts.prepare import BackendPreparer
from emb_model_provider.main import run

if TYPE_CHECKING:
    from emb_model_provider.artifacts.prepare import PreparedBackend
    from emb_model_provider.backends.base import Backend, Outputs, TokenBatch

SLEEP = "BENCHMARKS_SLEEP_S"
"""Variable: seconds that a batch takes, and seconds for each of its tokens, such as `0.005,0.001`."""
STREAMS = "BENCHMARKS_STREAMS"
"""Variable: number of streams of each model of a process. Unset: those of the real model."""


class SleepingBackend:
    """A real backend that first sleeps."""

    def __init__(self, backend: Backend, batch_s: float, token_s: float) -> None:
        self.description = backend.description
        self.streams = int(os.environ.get(STREAMS) or backend.streams)
        self._backend = backend
        self._batch_s, self._token_s = batch_s, token_s

    def run(self, batch: TokenBatch) -> Outputs:
        time.sleep(self._batch_s + self._token_s * sum(map(len, batch.ids)))
        return self._backend.run(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def slow_down() -> None:
    """Make the models of this process sleep, if it has the variable."""
    if SLEEP not in os.environ:
        return
    batch_s, token_s = map(float, os.environ[SLEEP].split(","))
    prepare = BackendPreparer.prepare

    def prepare_sleeping(*arguments: Any, **options: Any) -> PreparedBackend:
        prepared = prepare(*arguments, **options)
        return replace(prepared, load=lambda: SleepingBackend(prepared.load(), batch_s, token_s))

    BackendPreparer.prepare = prepare_sleeping  # type: ignore[method-assign]  # this process only measures


if __name__ == "__main__":
    slow_down()
    run()
