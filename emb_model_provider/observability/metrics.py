"""Prometheus metrics of requests, batches, queues and models."""

from __future__ import annotations

import os
import platform
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    multiprocess,
    values,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from emb_model_provider.batch_jobs.types import Answer, BatchState
from emb_model_provider.observability.activity import Activity, Failure
from emb_model_provider.registry import State
from emb_model_provider.workers import metrics_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from prometheus_client import Metric
    from prometheus_client.samples import Sample

    from emb_model_provider.progress import WorkRecord
    from emb_model_provider.registry import ModelStatus
    from emb_model_provider.serving.jobs import BatchRecord, StageRecord
    from emb_model_provider.workers import Worker

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_COMPILE_SECONDS = (5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0)
_VERSIONED = ("emb-model-provider", "openvino", "tokenizers", "torch", "transformers", "sentence-transformers")
"""Packages whose versions decide which vectors a model has."""
_SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)


@dataclass(slots=True)
class RequestRecord:
    """Measurements of one HTTP request, filled in by the middleware and the route. Times in seconds."""

    method: str
    path: str
    request_id: str
    status: int = 0
    duration_s: float = 0.0
    model: str = ""
    """Alias of the model. Empty without a model and for unknown names, because each value is a label of a metric."""
    inputs: int = 0
    tokens: int = 0
    tokenize_s: float | None = None
    queue_s: float | None = None
    inference_s: float | None = None
    key_name: str = ""
    """Name of the API key, never the key itself. Empty if no key is required, or the key is not valid."""
    error_code: str = ""
    """Machine-readable name of the error in the response."""
    is_forwarded: bool = False
    """Whether another worker answers the request, and records it."""


class Metrics:
    """The metrics of one service. Those of models, queues and the result cache are read at each scrape."""

    def __init__(
        self,
        models: Callable[[], Sequence[ModelStatus]],
        cache_bytes: Callable[[], int] = lambda: 0,
        worker: Worker | None = None,
    ) -> None:
        """Create the metrics.

        One of several workers keeps its counters and histograms in files, in the way that prometheus_client offers for this.
        Each worker can read those of all, and they go on after a restart: a sum that fell would look like a restart of the
        whole service, and its value like an increase.
        """
        self._worker = worker
        # They would add a series for each counter and histogram that dashboards do not use.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = self._live = CollectorRegistry()
        is_primary = worker is None or worker.is_primary
        if worker is not None:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics_directory(worker.directory))
            values.ValueClass = values.MultiProcessValue(lambda: worker.index)  # type: ignore[no-untyped-call]  # without types
            self._live = CollectorRegistry()
        self._live.register(_ModelCollector(models, is_primary=is_primary))
        ProcessCollector(registry=self._live)
        if is_primary:
            build = Info("emb_provider_build", "Versions of the service and of its packages.", registry=self._live)
            build.info({"python": platform.python_version(), **_versions()})

        # Cached, because looking a label up takes longer than counting. There are few aliases, statuses and outcomes.
        def counter(name: str, text: str, *labels: str) -> Callable[..., Counter]:
            return cache(Counter(f"emb_provider_{name}", text, labels, registry=self._registry).labels)

        def histogram(name: str, text: str, buckets: Sequence[float], label: str = "model") -> Callable[..., Histogram]:
            return cache(
                Histogram(f"emb_provider_{name}", text, (label,), buckets=buckets, registry=self._registry).labels
            )

        self._requests = counter("requests", "Requests for embeddings or scores.", "model", "status")
        self._errors = counter(
            "errors", "Failed requests for embeddings or scores, also those that name no known model.", "model", "code"
        )
        self._key_requests = counter("key_requests", "Requests for embeddings or scores by API key.", "key", "status")
        self._key_tokens = counter("key_tokens", "Tokens of inputs by API key.", "key")
        self._request_s = histogram(
            "request_seconds", "Time from the head of a request to the last byte of its response.", _SECONDS
        )
        self._inputs = counter("inputs", "Inputs: texts, or pairs of texts.", "model")
        self._tokens = counter("tokens", "Tokens of inputs, including special tokens.", "model")
        self._truncated = counter(
            "truncated_inputs", "Inputs that were cut to the longest input of the model.", "model"
        )
        self._tokenize_s = histogram("tokenize_seconds", "Time for tokenizing a request.", _SECONDS)
        self._queue_s = histogram(
            "queue_seconds", "Time from the submission of a request to its first batch.", _SECONDS
        )
        self._batches = counter("batches", "Batches.", "model", "outcome")
        self._batch_inputs = histogram("batch_inputs", "Inputs per batch.", _SIZES)
        self._batch_padding = histogram("batch_padding_ratio", "Share of padding among the tokens of a batch.", _SHARES)
        self._inference_s = histogram("inference_seconds", "Time for running a batch.", _SECONDS)
        self._cache_hits = counter(
            "result_cache_hits", "Different inputs of requests whose vectors were in the result cache.", "model"
        )
        self._cache_misses = counter(
            "result_cache_misses", "Different inputs of requests whose vectors were not in the result cache.", "model"
        )
        self._downloads = counter("downloads", "Downloads of models, by how they ended.", "outcome")
        self._download_bytes = Counter(
            "emb_provider_download_bytes", "Bytes of downloads of models.", registry=self._registry
        )
        self._compile_s = histogram(
            "compile_seconds", "Time for compiling a model, by how it ended.", _COMPILE_SECONDS, "outcome"
        )
        self._lines = counter(
            "batch_job_lines", "Lines of batches of the Batch API that this service has answered.", "outcome"
        )
        self._line_tokens = Counter(
            "emb_provider_batch_job_tokens", "Tokens of lines of batches.", registry=self._registry
        )
        self._jobs = _JobCollector()
        self._live.register(self._jobs)
        # With a value from the start, because an alert cannot see the first increase of a series that did not exist.
        for outcome in ("ok", "failed", "cancelled"):
            self._downloads(outcome)
            self._compile_s(outcome)
        for outcome in ("completed", "failed"):
            self._lines(outcome)
        self._live.register(_CacheCollector(cache_bytes))
        self.activity = Activity()

    def on_batch(self, record: BatchRecord) -> None:
        """Record a batch. Called on a thread of the model."""
        self._batches(record.model, "failed" if record.failed else "ok").inc()
        self._batch_inputs(record.model).observe(record.inputs)
        self._batch_padding(record.model).observe(1 - record.tokens / record.padded_tokens)
        self._inference_s(record.model).observe(record.inference_s)
        self.activity.on_batch(record.inputs, record.tokens, record.padded_tokens)

    def on_stages(self, record: StageRecord) -> None:
        """Record the inputs of a request that has its results."""
        if record.truncated:
            self._truncated(record.model).inc(record.truncated)

    def on_work(self, record: WorkRecord) -> None:
        """Record a download or a compilation. Called on its thread."""
        if record.kind == "compile":
            self._compile_s(record.outcome).observe(record.duration_s)
        else:
            self._downloads(record.outcome).inc()
            self._download_bytes.inc(record.transferred_bytes)

    def on_lookup(self, model: str, hits: int, misses: int) -> None:
        """Record how many inputs of a request have a vector in the result cache, and how many do not."""
        if hits:
            self._cache_hits(model).inc(hits)
        if misses:
            self._cache_misses(model).inc(misses)

    def on_request(self, record: RequestRecord) -> None:
        """Record an answered request for embeddings or scores."""
        self._requests(record.model, str(record.status)).inc()
        if record.status >= 400:
            self._errors(record.model, record.error_code or "disconnected").inc()
        if record.key_name:
            self._key_requests(record.key_name, str(record.status)).inc()
            self._key_tokens(record.key_name).inc(record.tokens)
        self._request_s(record.model).observe(record.duration_s)
        if record.tokenize_s is not None:
            self._inputs(record.model).inc(record.inputs)
            self._tokens(record.model).inc(record.tokens)
            self._tokenize_s(record.model).observe(record.tokenize_s)
        if record.queue_s is not None:
            self._queue_s(record.model).observe(record.queue_s)
        self.activity.on_request(record.duration_s, record.tokens, _failure(record) if record.status >= 400 else None)

    def on_lines(self, answers: Sequence[Answer]) -> None:
        """Record answered lines of a batch."""
        failed = sum(answer.status_code >= 400 for answer in answers)
        for outcome, count in (("failed", failed), ("completed", len(answers) - failed)):
            if count:
                self._lines(outcome).inc(count)
        self._line_tokens.inc(sum(answer.tokens for answer in answers))

    def set_jobs(self, states: Mapping[str, int], file_bytes: int) -> None:
        """Set how many batches there are in each state, and how large all files are."""
        self._jobs.states, self._jobs.file_bytes = states, file_bytes

    def samples(self) -> list[Sample]:
        """Return the values of all metrics, without those of the process."""
        samples = [sample for metric in self._registry.collect() for sample in metric.samples]
        return [sample for sample in samples if sample.name.startswith("emb_provider_")]

    def text(self, of_others: Sequence[str] = ()) -> bytes:
        """Return all metrics in the text format of Prometheus.

        Of several workers, it returns those of the whole service, with the `live_text` of each of the others.
        """
        if self._worker is None:
            return generate_latest(self._registry)
        counted = CollectorRegistry()
        directory = str(metrics_directory(self._worker.directory))
        multiprocess.MultiProcessCollector(counted, directory)  # type: ignore[no-untyped-call]  # without types
        return generate_latest(_Sum([self.live_text(), *of_others])) + generate_latest(counted)

    def live_text(self) -> str:
        """Return the metrics of this worker that are read at each scrape, in the text format of Prometheus."""
        return generate_latest(self._live).decode()


def _versions() -> dict[str, str]:
    """Return the installed versions by name, as labels."""
    found: dict[str, str] = {}
    for package in _VERSIONED:
        try:
            found["version" if package == "emb-model-provider" else package.replace("-", "_")] = version(package)
        except PackageNotFoundError:  # an image without torch
            continue
    return found


def _failure(record: RequestRecord) -> Failure:
    return Failure(
        at=time.time(),
        status=record.status,
        code=record.error_code,
        model=record.model,
        path=record.path[:200],
        request_id=record.request_id,
    )


class _Sum(CollectorRegistry):
    """The metrics of several workers. Each value is a sum, except for the time at which the first one started."""

    def __init__(self, texts: Iterable[str]) -> None:
        super().__init__()
        self._texts = texts

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        found: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], list[float]]] = defaultdict(dict)
        for text in self._texts:
            for family in text_string_to_metric_families(text):
                families.setdefault(family.name, family)
                for sample in family.samples:
                    key = sample.name, tuple(sample.labels.items())
                    found[family.name].setdefault(key, []).append(sample.value)
        for name, family in families.items():
            combine = min if name == "process_start_time_seconds" else sum
            family.samples = []
            for (sample_name, labels), numbers in found[name].items():
                family.add_sample(sample_name, dict(labels), combine(numbers))
            yield family


class _CacheCollector(Collector):
    """The size of the result cache."""

    def __init__(self, size_bytes: Callable[[], int]) -> None:
        self._size_bytes = size_bytes

    def collect(self) -> Iterable[Metric]:
        name, text = "emb_provider_result_cache_bytes", "Memory of the result cache."
        return (GaugeMetricFamily(name, text, value=self._size_bytes()),)


class _JobCollector(Collector):
    """Batches of the Batch API and their files. Without samples until the database has been opened."""

    def __init__(self) -> None:
        self.states: Mapping[str, int] | None = None
        self.file_bytes = 0

    def collect(self) -> Iterable[Metric]:
        jobs = GaugeMetricFamily(
            "emb_provider_batch_jobs", "Batches of the Batch API in the database.", labels=("state",)
        )
        size = GaugeMetricFamily("emb_provider_batch_file_bytes", "Size of the files of the Batch API.", labels=())
        if self.states is not None:
            for state in get_args(BatchState):
                jobs.add_metric((state,), self.states.get(state, 0))
            size.add_metric((), self.file_bytes)
        return (jobs, size)


class _ModelCollector(Collector):
    """Reads states and queues of the models at each scrape.

    States, and why models are unloaded, are decisions of the primary worker, which the others follow.
    """

    def __init__(self, models: Callable[[], Sequence[ModelStatus]], *, is_primary: bool) -> None:
        self._models = models
        self._is_primary = is_primary

    def collect(self) -> Iterable[Metric]:
        state = GaugeMetricFamily(
            "emb_provider_model_state",
            "1 for the current state of a model, 0 for the others.",
            labels=("model", "state"),
        )
        inputs = GaugeMetricFamily("emb_provider_queue_inputs", "Inputs in the queue.", labels=("model",))
        tokens = GaugeMetricFamily("emb_provider_queue_tokens", "Tokens in the queue.", labels=("model",))
        waiting = GaugeMetricFamily(
            "emb_provider_waiting_requests", "Requests that wait for their first batch.", labels=("model",)
        )
        running = GaugeMetricFamily(
            "emb_provider_running_requests", "Requests of which a batch has begun.", labels=("model",)
        )
        restarts = CounterMetricFamily(
            "emb_provider_model_restarts", "Restarts of a model after a crash.", labels=("model",)
        )
        memory = GaugeMetricFamily(
            "emb_provider_model_memory_bytes",
            "Memory of a model in bytes, estimated from its weights; 0 if it is not loaded.",
            labels=("model",),
        )
        unloads = CounterMetricFamily("emb_provider_model_unloads", "Unloads of a model.", labels=("model", "reason"))
        for model in self._models():
            alias = model.spec.alias
            for candidate in State:
                state.add_metric((alias, candidate.value), float(model.state is candidate))
            inputs.add_metric((alias,), model.waiting_inputs)
            tokens.add_metric((alias,), model.waiting_tokens)
            waiting.add_metric((alias,), model.waiting_requests)
            running.add_metric((alias,), model.running_requests)
            restarts.add_metric((alias,), model.restarts)
            memory.add_metric((alias,), model.memory_bytes or 0)
            for reason, count in model.unloads.items():
                unloads.add_metric((alias, reason), count)
        decided = (state, unloads) if self._is_primary else ()
        return (*decided, inputs, tokens, waiting, running, restarts, memory)
