"""`python -m tests.faults.service`: the real service, with faults planted in its backends.

FAULTS_DIR in the environment is the directory of `planted.Control`. FAULTS_PATCH may be JSON that shortens what would
take a test too long: `{"emb_model_provider.serving.scheduler:_LOWERED_BUDGET_S": 5.0}`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emb_model_provider.artifacts.prepare import prepare_backend as prepare
from emb_model_provider.main import run
from emb_model_provider.observability.metrics import Metrics
from emb_model_provider.registry import loader as loading
from tests.faults.planted import Control, FaultyBackend

if TYPE_CHECKING:
    from emb_model_provider.artifacts.prepare import PreparedBackend
    from emb_model_provider.backends.base import Backend
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.serving.jobs import BatchRecord


def plant(control: Control) -> None:
    """Let every backend that is loaded from now on, and the counting of batches, fail when asked to."""
    count = Metrics.on_batch

    def prepare_backend(spec: ModelSpec, *arguments: Any, **options: Any) -> PreparedBackend:
        prepared = prepare(spec, *arguments, **options)

        def load() -> Backend:
            control.record("load", alias=spec.alias)
            if control.value("no-load", spec.alias) is not None:
                raise RuntimeError("planted: it cannot be loaded")
            backend = FaultyBackend(prepared.load(), spec.alias, control)
            control.record("loaded", alias=spec.alias, streams=backend.streams)
            return backend

        return dataclasses.replace(prepared, load=load)

    def on_batch(metrics: Metrics, record: BatchRecord) -> None:
        error = control.take("on-batch", record.model)
        if error is not None:
            control.record("fault", kind="on-batch", alias=record.model)
            raise {"RuntimeError": RuntimeError, "SystemExit": SystemExit}[error](
                "planted: no counting today"
            )
        count(metrics, record)

    # As the registry will call it, and as the application hands it on.
    loading.prepare_backend = prepare_backend  # type: ignore[attr-defined]  # planting changes what is not exported
    Metrics.on_batch = on_batch  # type: ignore[assignment, method-assign]  # likewise


def patch(values: dict[str, Any]) -> None:
    """Set constants, named `module:NAME`; a name that is not there any more is an error."""
    for name, value in values.items():
        module_name, _, attribute = name.partition(":")
        module = import_module(module_name)
        if not hasattr(module, attribute):
            raise AttributeError(f"{name} is not there to be patched")
        setattr(module, attribute, value)


if __name__ == "__main__":
    patch(json.loads(os.environ.get("FAULTS_PATCH", "{}")))
    plant(Control(Path(os.environ["FAULTS_DIR"])))
    run()
