"""`GET /metrics` of a running service."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from emb_model_provider.observability.metrics import Metrics
from emb_model_provider.progress import WorkRecord
from tests.service import BUNDLED

if TYPE_CHECKING:
    from tests.service import Service

MODEL = {"model": BUNDLED}


def test_format_is_valid(service: Service) -> None:
    """The text can be parsed, each metric has our prefix or that of processes, and no series occurs twice."""
    response = service.http.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(response.text))
    assert len(families) >= 12
    assert all(family.name.startswith(("emb_provider_", "process_")) and family.documentation for family in families)
    samples = [(sample.name, tuple(sorted(sample.labels.items()))) for family in families for sample in family.samples]
    assert len(samples) == len(set(samples))
    assert not any(name.endswith("_created") for name, _ in samples)


def test_requests_are_counted_by_model_and_status(service: Service) -> None:
    """Each response counts once, under the alias of its model. Unknown names share one label."""
    cases = [
        ({"input": "x", "model": "all-MiniLM-L6-v2"}, {**MODEL, "status": "200"}),
        ({"input": "x", "dimensions": 5}, {**MODEL, "status": "400"}),
        ({"input": "x", "model": "made-up-by-the-caller"}, {"model": "", "status": "404"}),
        ({"input": []}, {"model": "", "status": "400"}),
    ]
    for body, labels in cases:
        before = service.figure("emb_provider_requests_total", **labels)
        service.http.post("/v1/embeddings", json=body)
        assert service.figure("emb_provider_requests_total", **labels) == before + 1
    assert "made-up-by-the-caller" not in service.http.get("/metrics").text


def test_request_is_counted_in_all_metrics(service: Service) -> None:
    """Each metric increases by the work of the request."""
    names = {
        "emb_provider_inputs_total": 3, "emb_provider_tokens_total": 3 + 3 + 12,
        "emb_provider_request_seconds_count": 1, "emb_provider_tokenize_seconds_count": 1,
        "emb_provider_queue_seconds_count": 1, "emb_provider_batch_inputs_sum": 3,
    }  # fmt: skip
    before = {name: service.figure(name, **MODEL) for name in names}
    batches = service.figure("emb_provider_batches_total", outcome="ok", **MODEL)
    seconds = service.figure("emb_provider_inference_seconds_sum", **MODEL)
    padding = service.figure("emb_provider_batch_padding_ratio_count", **MODEL)
    # Texts of no other test, because the vectors of those may be in the result cache.
    assert service.embed("river", "stone", "train " * 10).status_code == 200
    assert {name: service.figure(name, **MODEL) - before[name] for name in names} == names
    ran = service.figure("emb_provider_batches_total", outcome="ok", **MODEL) - batches
    assert 1 <= ran <= 3
    assert service.figure("emb_provider_batch_padding_ratio_count", **MODEL) - padding == ran
    assert service.figure("emb_provider_inference_seconds_sum", **MODEL) > seconds


def test_hits_and_misses_of_the_result_cache(service: Service) -> None:
    """A repeated input is a hit, and is computed by no batch. Identical inputs of a request count once."""
    names = [
        f"emb_provider_{name}" for name in ("result_cache_hits_total", "result_cache_misses_total", "batch_inputs_sum")
    ]
    before = [service.figure(name, **MODEL) for name in names]
    first = service.embed("meadow", "harbor", "meadow").json()["data"]
    assert [service.figure(name, **MODEL) - value for name, value in zip(names, before, strict=True)] == [0, 2, 2]
    assert service.figure("emb_provider_result_cache_bytes") > 0
    again = service.embed("harbor", "meadow").json()["data"]
    assert [service.figure(name, **MODEL) - value for name, value in zip(names, before, strict=True)] == [2, 2, 2]
    assert [item["embedding"] for item in again] == [first[1]["embedding"], first[0]["embedding"]]
    assert first[0]["embedding"] == first[2]["embedding"]


def test_errors_are_counted_by_code_without_a_model(service: Service) -> None:
    """Also those of requests that name no known model, whose label is empty."""
    cases = [({"input": "x", "model": "made-up"}, "", "model_not_found"), ({"input": "x", "dimensions": 5}, BUNDLED, "invalid_dimensions")]  # fmt: skip
    for body, model, code in cases:
        before = service.figure("emb_provider_errors_total", model=model, code=code)
        service.http.post("/v1/embeddings", json=body)
        assert service.figure("emb_provider_errors_total", model=model, code=code) == before + 1


def test_truncated_inputs_are_counted(service: Service) -> None:
    """An input of more than 256 tokens is cut by the bundled model."""
    before = service.figure("emb_provider_truncated_inputs_total", **MODEL)
    service.embed("short", "long " * 300, "longer " * 400)
    assert service.figure("emb_provider_truncated_inputs_total", **MODEL) == before + 2


def test_process_and_versions_are_shown(service: Service) -> None:
    """The memory and the processor time are those of the process, and the versions those that are installed."""
    process = psutil.Process(service.process.pid)
    used = service.figure("process_resident_memory_bytes")
    assert used == pytest.approx(process.memory_info().rss, rel=0.3)
    assert 0 < service.figure("process_cpu_seconds_total") <= sum(process.cpu_times()[:2]) + 1
    assert service.figure("process_start_time_seconds") == pytest.approx(process.create_time(), abs=5)
    installed = {"version": version("emb-model-provider"), "openvino": version("openvino"), "torch": version("torch")}
    assert service.figure("emb_provider_build_info", **installed) == 1


def test_no_requests_wait_when_all_are_answered(service: Service) -> None:
    """The gauges exist and are 0."""
    text = service.http.get("/metrics").text
    for name in ("waiting", "running"):
        assert f'emb_provider_{name}_requests{{model="{BUNDLED}"}} 0.0' in text


def test_compilations_and_downloads_are_counted(service: Service) -> None:
    """Each outcome has a series from the start, so that an alert sees the first one. A local model is not downloaded."""
    for outcome in ("ok", "failed", "cancelled"):
        assert f'emb_provider_downloads_total{{outcome="{outcome}"}}' in service.http.get("/metrics").text
        assert f'emb_provider_compile_seconds_count{{outcome="{outcome}"}}' in service.http.get("/metrics").text
    assert service.figure("emb_provider_downloads_total") == 0


def test_outcomes_of_downloads_and_compilations() -> None:
    """Downloads are counted with their bytes, and the time of compilations is measured."""
    metrics = Metrics(list)
    metrics.on_work(WorkRecord("download", "a/b", "ok", 3.0, 700))
    metrics.on_work(WorkRecord("download", "a/b", "failed", 1.0, 50))
    metrics.on_work(WorkRecord("compile", "a/b", "ok", 15.0, 0))
    lines = metrics.text().decode().splitlines()
    assert 'emb_provider_downloads_total{outcome="ok"} 1.0' in lines
    assert 'emb_provider_downloads_total{outcome="failed"} 1.0' in lines
    assert "emb_provider_download_bytes_total 750.0" in lines
    assert 'emb_provider_compile_seconds_sum{outcome="ok"} 15.0' in lines
    assert 'emb_provider_compile_seconds_bucket{le="20.0",outcome="ok"} 1.0' in lines


def test_rejected_request_counts_no_work(service: Service) -> None:
    """An error is not counted as an input, token or batch."""
    names = ["emb_provider_inputs_total", "emb_provider_tokens_total", "emb_provider_batches_total"]
    before = [service.figure(name) for name in names]
    service.embed("x", dimensions=5)
    assert [service.figure(name) for name in names] == before


def test_queue_gauges_are_zero_without_requests(service: Service) -> None:
    """The gauges exist and are 0."""
    text = service.http.get("/metrics").text
    assert f'emb_provider_queue_inputs{{model="{BUNDLED}"}} 0.0' in text
    assert f'emb_provider_queue_tokens{{model="{BUNDLED}"}} 0.0' in text


def test_other_requests_are_not_counted(service: Service) -> None:
    """Health checks and scrapes are not requests for embeddings."""
    before = service.figure("emb_provider_requests_total")
    for path in ("/health", "/ready", "/v1/models", "/no/such"):
        service.http.get(path)
    assert service.figure("emb_provider_requests_total") == before
