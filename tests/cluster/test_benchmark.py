"""The benchmark of Ray Serve runs from its command line to its tables, and no request fails. No time is asserted."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from benchmarks import ROOT
from tests.docs.markdown import rows

if TYPE_CHECKING:
    from tests.clients.isolated import Environment

pytestmark = pytest.mark.slow


def test_each_way_of_a_request_has_a_latency_and_a_rate(ray: Environment) -> None:
    """The service, and Ray's two proxies."""
    table = _run(ray, "overhead")
    assert [row[0] for row in table] == ["service", "Ray, Python proxy", "Ray, HAProxy"]
    assert all(float(row[1]) > 0 and float(row[3].replace(",", "")) > 0 for row in table)


def test_all_replicas_answer_and_are_among_the_metrics_of_ray(ray: Environment) -> None:
    """Each application has as many replicas as it was deployed with."""
    table = _run(ray, "throughput", "--without", "Ray, Python proxy")
    assert [row[1:3] for row in table] == [["1", "1"], ["3", "3"]]


def test_clients_notice_no_failure(ray: Environment) -> None:
    """The retries of the SDK answer the requests that a killed process had; a rolling deploy needs none.

    All answers have the right vectors, and are given before and after each event.
    """
    table = _run(ray, "faults", "--without", "Ray, Python proxy")
    assert [(row[1], row[2], row[4]) for row in table] == [
        ("a replica is killed", "2", "0"),
        ("a node is killed", "2", "0"),
        ("the controller is killed", "2", "0"),
        ("a replica is killed after that", "2", "0"),
        ("a rolling deploy", "0", "0"),
        ("a step of load adds a replica", "2", "0"),
    ]
    assert all(int(row[3]) >= 50 for row in table)


def _run(ray: Environment, part: str, *options: str) -> list[list[str]]:
    """Return the table of a part of the benchmark."""
    done = subprocess.run(
        [ray.program("python"), "-m", "benchmarks.ray_serve", "--quick", "--parts", part, *options],
        cwd=ROOT,
        env=ray.variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return rows(done.stdout)[2:]
