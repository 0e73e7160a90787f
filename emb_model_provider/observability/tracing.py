"""Traces of requests and batches with OpenTelemetry, if its standard variables ask for them.

Nothing of OpenTelemetry is imported before that. The spans of a request's stages are created when the request has its
results, from times that are measured anyway.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import contextmanager
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, cast

from emb_model_provider.serving.jobs import trace_context

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from emb_model_provider.observability.metrics import RequestRecord
    from emb_model_provider.serving.jobs import BatchRecord, StageRecord

logger = logging.getLogger(__name__)

_SERVICE_NAME = "emb-model-provider"
_EXPORTERS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
"""Names of the exporters of OTLP, by OTEL_EXPORTER_OTLP_PROTOCOL."""
_FLUSH_MS = 4_000
"""How long the last spans may take to be sent at shutdown."""


class Tracing:
    """Creates the spans of one service. Thread-safe."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("emb_model_provider", version(_SERVICE_NAME))

    @contextmanager
    def request(self, record: RequestRecord, route: str, headers: Mapping[str, str]) -> Iterator[None]:
        """Create the span of a request, as a child of the span that its headers name.

        Args:
            record: Measurements of the request, which are complete at the end of the block.
            route: The path, if it is one of the service's; else an empty string, because names of spans must be few.
            headers: The headers of the request, in lower case.
        """
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, StatusCode

        span = self._tracer.start_span(
            f"{record.method} {route}".rstrip(),
            context=extract(headers),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": record.method,
                "url.path": record.path[:200],
                "emb_provider.request_id": record.request_id,
                **({"http.route": route} if route else {}),
            },
        )
        token = trace_context.set(span)
        try:
            yield
        finally:
            trace_context.reset(token)
            if span.is_recording():
                span.set_attribute("http.response.status_code", record.status)
                if record.model:
                    span.set_attributes(
                        {
                            "gen_ai.request.model": record.model,
                            "gen_ai.usage.input_tokens": record.tokens,
                            "emb_provider.inputs": record.inputs,
                        }
                    )
                if record.error_code:
                    span.set_attribute("error.type", record.error_code)
                if record.status >= 500 or not record.status:
                    span.set_status(StatusCode.ERROR)
            span.end()

    def on_stages(self, record: StageRecord) -> None:
        """Create the spans of the stages of a request. Called in the context of the request."""
        from opentelemetry.trace import set_span_in_context

        span = _request_span(trace_context.get())
        if span is None:
            return
        context = set_span_in_context(span)
        offset = time.time_ns() - time.monotonic_ns()

        def add(name: str, start_s: float, duration_s: float, **attributes: str | int) -> None:
            start = int(start_s * 1e9) + offset
            named = {f"emb_provider.{key}": value for key, value in attributes.items()}
            stage = self._tracer.start_span(name, context=context, attributes=named, start_time=start)
            stage.end(start + int(duration_s * 1e9))

        add("tokenize", record.started_at, record.tokenize_s, tokens=record.tokens, truncated=record.truncated)
        if record.submitted_at is not None:
            add("queue", record.submitted_at, record.timing.queue_s)
            add("inference", record.submitted_at + record.timing.queue_s, record.timing.inference_s, model=record.model)

    def on_batch(self, record: BatchRecord) -> None:
        """Create the span of a batch, linked to the requests that it served. Called on a thread of the model."""
        from opentelemetry.context import Context
        from opentelemetry.trace import Link

        spans = [span for trace in record.traces if (span := _request_span(trace)) is not None]
        if not spans:
            return
        end = time.time_ns()
        batch = self._tracer.start_span(
            "batch",
            context=Context(),  # of its own, because several requests can share it
            links=[Link(span.get_span_context()) for span in spans],
            attributes={
                "gen_ai.request.model": record.model,
                "emb_provider.inputs": record.inputs,
                "emb_provider.tokens": record.tokens,
                "emb_provider.padded_tokens": record.padded_tokens,
                "emb_provider.failed": record.failed,
            },
            start_time=end - int(record.inference_s * 1e9),
        )
        batch.end(end)

    def stop(self) -> None:
        """Send the remaining spans. Blocks, for some seconds if the collector does not answer."""
        self._provider.force_flush(_FLUSH_MS)
        self._provider.shutdown()


def start_tracing(environ: Mapping[str, str] = os.environ) -> Tracing | None:
    """Return what creates spans, or None if no OTEL_… variable asks for traces.

    They are sent if OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_TRACES_EXPORTER is set, and
    neither OTEL_SDK_DISABLED=true nor OTEL_TRACES_EXPORTER=none.
    """
    name = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if name == "none" or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if not name and not any(environ.get(variable, "").strip() for variable in endpoints):
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = _create_exporter(name or "otlp", environ)
    except (ImportError, LookupError) as error:
        logger.warning(
            "there are no traces, although the variables of OpenTelemetry ask for them: %s. Install the packages of the "
            "extra: pip install 'emb-model-provider[otel]'",
            error,
        )
        return None
    # The SDK reads OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, which take precedence, and OTEL_TRACES_SAMPLER.
    detected = Resource.create().attributes
    unnamed = str(detected.get("service.name", "")).startswith("unknown_service")
    named = {"service.name": _SERVICE_NAME} if unnamed else {}
    resource = Resource.create({**named, "service.version": version(_SERVICE_NAME)})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    logger.info("traces are sent with the exporter %s of OpenTelemetry", name or "otlp")
    return Tracing(provider)


def _create_exporter(name: str, environ: Mapping[str, str]) -> SpanExporter:
    """Return the exporter with this name in OTEL_TRACES_EXPORTER; LookupError if it is not installed."""
    if name == "otlp":
        general = environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "").strip() or "http/protobuf"
        protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "").strip() or general
        if protocol not in _EXPORTERS:
            raise LookupError(f"the protocol {protocol} is not one of {', '.join(_EXPORTERS)}")
        name = _EXPORTERS[protocol]
    found = list(entry_points(group="opentelemetry_traces_exporter", name=name))
    if not found:
        raise LookupError(f"no installed package has the exporter {name}")
    return cast("SpanExporter", found[0].load()())


def _request_span(trace: object) -> Span | None:
    """Return the span of a request, or None if there is none, or it is not sampled."""
    span = cast("Span | None", trace)
    return span if span is not None and span.get_span_context().trace_flags.sampled else None
