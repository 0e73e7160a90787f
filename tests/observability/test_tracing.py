"""Traces of a running service, which a collector receives through OTLP."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from emb_model_provider.observability.tracing import start_tracing
from tests.service import BUNDLED, COMMAND, Service, free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """A collector of OTLP over HTTP, which keeps the spans that it receives."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []
        self.requests: list[tuple[str, str | None]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
                for resource in message.resource_spans:
                    named = {item.key: item.value.string_value for item in resource.resource.attributes}
                    collector.resources.append(named)
                    for scope in resource.scope_spans:
                        collector.spans.extend(scope.spans)
                collector.requests.append((self.path, self.headers["content-type"]))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def trace(self, trace_id: str) -> list[Span]:
        return [span for span in self.spans if span.trace_id.hex() == trace_id]

    def wait_for(self, trace_id: str, spans: int) -> dict[str, Span]:
        """Return the spans of a trace by name, when there are so many of them."""
        wait_until(lambda: len(self.trace(trace_id)) >= spans, 60)
        return {span.name: span for span in self.trace(trace_id)}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    started = Collector()
    yield started
    started.close()


@pytest.fixture(scope="module")
def traced(
    collector: Collector, tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str
) -> Iterator[Service]:
    """Return a service that sends its spans to the collector soon."""
    command = with_variables(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_BSP_SCHEDULE_DELAY="100")
    settings = {"CACHE_DIR": service_cache, "BACKEND": backend, "RESULT_CACHE_MB": "0"}
    with Service(tmp_path_factory.mktemp("traced"), command=command, **settings) as started:
        yield started.wait()


def with_variables(**variables: str) -> list[str]:
    return ["env", "NO_PROXY=127.0.0.1", *(f"{name}={value}" for name, value in variables.items()), *COMMAND]


def attributes(span: Span) -> dict[str, str | int | bool]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def traceparent(trace_id: str, flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{trace_id}-{'b' * 16}-{flags}"}


def test_request_continues_the_trace_of_its_client(traced: Service, collector: Collector) -> None:
    """The request is a child of the client's span, and its stages are children of the request, within its time."""
    trace_id = "1" * 32
    body = {"input": ["one", "two " * 300]}
    response = traced.http.post("/v1/embeddings", json=body, headers=traceparent(trace_id))
    spans = collector.wait_for(trace_id, 4)
    assert set(spans) == {"POST /v1/embeddings", "tokenize", "queue", "inference"}
    request = spans.pop("POST /v1/embeddings")
    assert request.parent_span_id.hex() == "b" * 16
    assert request.kind == request.SPAN_KIND_SERVER
    found = attributes(request)
    assert found["http.response.status_code"] == 200
    assert found["http.route"] == "/v1/embeddings"
    assert found["gen_ai.request.model"] == BUNDLED
    assert found["gen_ai.usage.input_tokens"] == response.json()["usage"]["total_tokens"]
    assert found["emb_provider.request_id"] == response.headers["x-request-id"]
    for span in spans.values():
        assert span.parent_span_id == request.span_id
        assert request.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano
    assert attributes(spans["tokenize"])["emb_provider.truncated"] == 1
    assert spans["queue"].end_time_unix_nano == pytest.approx(spans["inference"].start_time_unix_nano, abs=2)


def test_batch_is_linked_to_the_request_that_it_served(traced: Service, collector: Collector) -> None:
    """It has a trace of its own, because several requests can share a batch."""
    trace_id = "2" * 32
    assert traced.http.post("/v1/embeddings", json={"input": "x"}, headers=traceparent(trace_id)).status_code == 200
    request = collector.wait_for(trace_id, 4)["POST /v1/embeddings"]

    def batches() -> list[Span]:
        return [span for span in collector.spans if any(link.trace_id.hex() == trace_id for link in span.links)]

    wait_until(batches, 60)
    (batch,) = batches()
    assert (batch.name, batch.parent_span_id) == ("batch", b"")
    assert [link.span_id for link in batch.links] == [request.span_id]
    assert attributes(batch)["emb_provider.inputs"] == 1
    assert attributes(batch)["emb_provider.failed"] is False


def test_failed_request_has_the_code_of_its_error(traced: Service, collector: Collector) -> None:
    """An error of the client does not make the span an error, as OpenTelemetry defines it."""
    trace_id = "3" * 32
    traced.http.post("/v1/embeddings", json={"input": "x", "model": "made-up"}, headers=traceparent(trace_id))
    (request,) = collector.wait_for(trace_id, 1).values()
    assert attributes(request)["error.type"] == "model_not_found"
    assert attributes(request)["http.response.status_code"] == 404
    assert request.status.code == request.status.STATUS_CODE_UNSET


def test_only_what_is_sampled_is_sent(traced: Service, collector: Collector) -> None:
    """Neither requests that the client did not sample nor those of monitoring, and no unknown path as a name."""
    dropped, sent = "4" * 32, "5" * 32
    traced.http.post("/v1/embeddings", json={"input": "x"}, headers=traceparent(dropped, "00"))
    for path in ("/health", "/metrics", "/ready"):
        traced.http.get(path, headers=traceparent(dropped))
    traced.http.get("/no/such", headers=traceparent(sent))
    assert set(collector.wait_for(sent, 1)) == {"GET"}
    assert collector.trace(dropped) == []


def test_service_is_named(traced: Service, collector: Collector) -> None:
    """Spans arrive in the standard form, and name the service and its version."""
    traced.embed("x")
    wait_until(lambda: collector.requests, 60)
    assert set(collector.requests) == {("/v1/traces", "application/x-protobuf")}
    assert {resource["service.name"] for resource in collector.resources} == {"emb-model-provider"}
    assert all(resource["service.version"] for resource in collector.resources)


@pytest.mark.slow
def test_service_works_without_its_collector(tmp_path: Path, service_cache: str, backend: str) -> None:
    """Requests are answered, and the service ends gracefully."""
    command = with_variables(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{free_port()}", OTEL_BSP_SCHEDULE_DELAY="50"
    )
    with Service(tmp_path, command=command, CACHE_DIR=service_cache, BACKEND=backend) as service:
        service.wait()
        assert [service.embed(f"text {n}").status_code for n in range(5)] == [200] * 5
        assert service.stop() == 0


def test_nothing_is_imported_without_traces() -> None:
    """A service whose environment has no OTEL_ variables loads no SDK. FastAPI imports the API if it is installed."""
    program = (
        "import sys\n"
        "import emb_model_provider.process.server\n"
        "from emb_model_provider.observability.tracing import start_tracing\n"
        "assert start_tracing({}) is None\n"
        "assert not [name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))]\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_SERVICE_NAME": "x"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": " "},
        {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://localhost:1"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
    ids=str,
)
def test_traces_are_off_unless_variables_ask_for_them(variables: dict[str, str]) -> None:
    assert start_tracing(variables) is None


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "zipkin"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "otlp_proto_grpc"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "carrier-pigeon"}, "carrier-pigeon"),
    ],
)
def test_exporter_that_is_not_installed_is_a_warning(
    variables: dict[str, str], missing: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The service starts without traces, and the message names what to install."""
    with caplog.at_level(logging.WARNING):
        assert start_tracing(variables) is None
    (record,) = caplog.records
    assert missing in record.getMessage()
    assert "emb-model-provider[otel]" in record.getMessage()
