"""`python -m tests.faults.service`: the real service, with faults planted in its backends.

Environment variables:

- FAULTS_DIR: directory of `planted.Control`.
- FAULTS_TIMINGS: JSON object with values of `serving.config.Timings`, so that tests need not wait as long as users.
- FAULTS_SUPERVISOR_TIMINGS: the same for `process.supervisor.SupervisorTimings`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emb_model_provider import main
from emb_model_provider.api import app
from emb_model_provider.artifacts.prepare import BackendPreparer
from emb_model_provider.observability.metrics import Metrics
from emb_model_provider.registry import RegistryConfig
from emb_model_provider.serving.config import Timings
from tests.faults.planted import Control, FaultyBackend

if TYPE_CHECKING:
    from emb_model_provider.artifacts.prepare import PreparedBackend
    from emb_model_provider.backends.base import Backend
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.process.supervisor import SupervisorTimings
    from emb_model_provider.serving.jobs import BatchRecord


def plant_faults(control: Control) -> None:
    """Wrap the preparation of backends and the recording of batches, so that they fail when `control` says so."""
    prepare, record_batch = BackendPreparer.prepare, Metrics.on_batch

    def prepare_faulty(preparer: BackendPreparer, spec: ModelSpec, *arguments: Any, **options: Any) -> PreparedBackend:
        prepared = prepare(preparer, spec, *arguments, **options)

        def load() -> Backend:
            control.record("load", alias=spec.alias)
            if control.value("no-load", spec.alias) is not None:
                raise RuntimeError("planted: it cannot be loaded")
            backend = FaultyBackend(prepared.load(), spec.alias, control)
            control.record("loaded", alias=spec.alias, streams=backend.streams)
            return backend

        return dataclasses.replace(prepared, load=load)

    def record_faulty(metrics: Metrics, record: BatchRecord) -> None:
        error = control.take("on-batch", record.model)
        if error is not None:
            control.record("fault", kind="on-batch", alias=record.model)
            raise {"RuntimeError": RuntimeError, "SystemExit": SystemExit}[error]("planted: not recorded")
        record_batch(metrics, record)

    BackendPreparer.prepare = prepare_faulty  # type: ignore[method-assign]
    Metrics.on_batch = record_faulty  # type: ignore[method-assign]


def change_timings() -> None:
    """Change the timings that the application and the supervisor are created with."""
    timings = Timings(**json.loads(os.environ.get("FAULTS_TIMINGS", "{}")))
    changes = json.loads(os.environ.get("FAULTS_SUPERVISOR_TIMINGS", "{}"))
    supervisor = main.Supervisor

    def registry_config(**values: Any) -> RegistryConfig:
        return RegistryConfig(**values | {"timings": timings})

    def changed_supervisor(sockets: Any, defaults: SupervisorTimings) -> Any:
        return supervisor(sockets, dataclasses.replace(defaults, **changes))

    app.RegistryConfig = registry_config  # type: ignore[assignment, misc, attr-defined]
    main.Supervisor = changed_supervisor  # type: ignore[assignment, misc]


if __name__ == "__main__":
    plant_faults(Control(Path(os.environ["FAULTS_DIR"])))
    change_timings()
    main.run()
