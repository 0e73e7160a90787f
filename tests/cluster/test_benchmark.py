"""The benchmark of Ray Serve runs from its command line to its table. No time is asserted."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from benchmarks import ROOT
from tests.docs.markdown import rows

if TYPE_CHECKING:
    from tests.clients.isolated import Environment


@pytest.mark.slow
def test_each_way_of_a_request_has_a_latency_and_a_rate(ray: Environment) -> None:
    """The service, and Ray's two proxies; no request fails."""
    done = subprocess.run(
        [ray.program("python"), "-m", "benchmarks.ray_serve", "--quick"],
        cwd=ROOT,
        env=ray.variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    table = rows(done.stdout)[2:]
    assert [row[0] for row in table] == ["service", "Ray, Python proxy", "Ray, HAProxy"]
    assert all(float(row[1]) > 0 and float(row[3].replace(",", "")) > 0 for row in table)
    assert "Errors: 0." in done.stdout
