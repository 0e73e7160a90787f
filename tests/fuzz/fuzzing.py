"""The number of examples, and a client that checks and counts responses."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import HealthCheck, settings

from tests.fuzz.contract import Response, check

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Mapping

    from tests.service import Service

KEY = "sk-fuzz-0123456789"
ORIGIN = "https://app.example"
EXAMPLES = 240
"""Approximate number of generated requests, unless `--fuzz-examples` sets it."""
fuzz_test = pytest.mark.parametrize(
    "scale", [pytest.param(1, id="few"), pytest.param(10, id="many", marks=pytest.mark.slow)]
)
"""Runs a test with its examples, and as a slow test with ten times as many."""


def settings_for(config: pytest.Config, share: float) -> settings:
    """Return hypothesis' settings for a test with a share of all examples.

    The examples are the same in each run, unless `--fuzz-examples` sets their number.
    """
    examples = config.getoption("--fuzz-examples")
    return settings(
        max_examples=max(1, round(share * (examples or EXAMPLES))),
        derandomize=examples is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


class Fuzz:
    """A client of the service that checks and counts all responses."""

    def __init__(self, service: Service, tally: Counter[tuple[str, str]], config: pytest.Config) -> None:
        self.service = service
        self._tally = tally
        self._config = config

    def settings(self, share: float) -> settings:
        """Return hypothesis' settings for a test with a share of all examples."""
        return settings_for(self._config, share)

    def post(self, body: bytes, headers: Mapping[str, Any] | None = None) -> Response:
        """Send a body unchanged, and return its response after it was counted and checked."""
        if headers is None:
            headers = {"content-type": "application/json"}
        response = Response.of(self.service.http.post("/v1/embeddings", content=body, headers=headers))
        self.count("POST /v1/embeddings", response)
        check(response)
        return response

    def count(self, operation: str, response: Response | None) -> None:
        """Count a response, or None for a connection without one."""
        outcome = "no response" if response is None else f"{response.status} {_code(response)}".strip()
        self._tally[operation, outcome] += 1

    def connect(self) -> socket.socket:
        return socket.create_connection(("localhost", self.service.port), timeout=120)

    def assert_alive(self) -> None:
        """Check on a new connection that the service still answers."""
        with httpx.Client(base_url=self.service.url, headers=self.service.http.headers, trust_env=False) as http:
            response = http.post("/v1/embeddings", json={"input": "hello"}, timeout=120)
        assert response.status_code == 200, response.text
        assert self.service.process.poll() is None


def _code(response: Response) -> str:
    if response.status < 400:
        return ""
    try:
        return str(json.loads(response.body)["error"]["code"])
    except (ValueError, LookupError, TypeError):
        return "?"
