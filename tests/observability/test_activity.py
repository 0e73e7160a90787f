"""Requests and batches by second."""

from __future__ import annotations

import pytest

from emb_model_provider.observability.activity import PERIOD_S, Activity, Failure
from emb_model_provider.observability.metrics import Metrics, RequestRecord

FAILURE = Failure(at=0.0, status=404, code="model_not_found", model="", path="/v1/embeddings", request_id="1")


class Clock:
    now = 1000.5

    def __call__(self) -> float:
        return self.now


def test_figures_are_those_of_the_last_seconds() -> None:
    """A second counts when it is over, and for ten seconds."""
    clock = Clock()
    activity = Activity(clock)
    for duration_s in (0.1, 0.2, 0.3, 0.4):
        activity.on_request(duration_s, 5, None)
    activity.on_batch(3, 90, 100)
    activity.on_batch(1, 10, 100)
    assert activity.figures().requests_per_s == 0
    clock.now += 1
    figures = activity.figures()
    assert (figures.requests_per_s, figures.tokens_per_s) == (0.4, 2.0)
    assert (figures.p50_s, figures.p95_s) == (0.3, 0.4)
    assert figures.inputs_per_batch == 2
    assert figures.padding == pytest.approx(0.5)
    clock.now += 10
    figures = activity.figures()
    assert (figures.requests_per_s, figures.p50_s, figures.inputs_per_batch, figures.padding) == (0, None, None, None)


def test_the_history_has_a_value_for_each_second() -> None:
    clock = Clock()
    activity = Activity(clock)
    activity.on_request(0.1, 7, None)
    clock.now += PERIOD_S
    history = activity.history()
    assert len(history) == PERIOD_S
    assert [each.tokens_per_s for each in history] == [7, *[0] * (PERIOD_S - 1)]
    assert [each.tokens_per_s for each in activity.history(PERIOD_S, 10)] == [0.7, *[0] * (PERIOD_S // 10 - 1)]


def test_old_seconds_are_forgotten() -> None:
    """Memory does not grow, whatever the rate and the time."""
    clock = Clock()
    activity = Activity(clock)
    for _ in range(3 * PERIOD_S):
        for _ in range(200):
            activity.on_request(0.1, 1, None)
        clock.now += 1
    history = activity.history()
    assert {each.requests_per_s for each in history} == {200}


def test_failures_have_no_latency_and_the_latest_is_first() -> None:
    clock = Clock()
    activity = Activity(clock)
    for number in range(30):
        activity.on_request(9.0, 0, Failure(at=number, status=400, code="", model="", path="", request_id=str(number)))
    clock.now += 1
    assert activity.figures().p95_s is None
    assert activity.figures().requests_per_s == 3
    assert [each.request_id for each in activity.failures()] == [str(number) for number in range(29, 9, -1)]


def test_metrics_record_failures_with_their_code() -> None:
    metrics = Metrics(list)
    record = RequestRecord(method="POST", path="/v1/embeddings", request_id="1", status=404)
    record.error_code = FAILURE.code
    metrics.on_request(record)
    (failure,) = metrics.activity.failures()
    assert (failure.status, failure.code, failure.request_id) == (404, "model_not_found", "1")
